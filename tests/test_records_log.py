"""What a reader of the log sees: lines on epochs, the end of a run, what goes on with it."""

import re
import signal
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from test_training_distributed import Torchrun
from test_training_runs import write_folder

import predict as predict_script
from cnn.training.saver import Saver
from cnn.utils.run_folder import RunFolder, latest_name, new_name


def lines_of(capfd) -> list[str]:
    return capfd.readouterr().err.splitlines()


@pytest.mark.parametrize("monitor", ["val_loss", "val_auc", "val_sensitivity", "val_balanced_acc"])
def test_a_line_on_an_epoch_fits_100_columns(train, capfd, monitor):
    words = [
        "data.args={num_images: 40, num_classes: 2, image_size: 8}",
        "train.epochs=100",
        f"checkpoint.monitor={monitor}",
    ]
    assert train(*words, "data.limit=8", "optim.lr=0.0123456") == 0
    told = [line for line in lines_of(capfd) if line.startswith("epoch ")]
    assert len(told) == 100 and max(map(len, told)) <= 100
    metric = monitor.removeprefix("val_")
    pattern = rf"epoch 7/100  train loss \d.* acc \d.*  val .*{metric} [\dn].*  lr 0.0123"
    assert re.match(pattern, told[6]), told[6]


def test_the_last_lines_name_report_checkpoint_and_the_next_command(train, capfd, monkeypatch):
    Path("examples").symlink_to(ROOT / "examples")
    words = ["--config", str(ROOT / "configs/config.yaml"), "train.epochs=9", "run=a"]
    assert train(*words) == 0
    report, best, then = lines_of(capfd)[-3:]
    assert report == "report: logs/a/report.html" and Path("logs/a/report.html").is_file()
    assert best.startswith("best checkpoint: checkpoints/a/best.pth (epoch ")
    assert then.startswith("next: python predict.py ")
    assert predict_script.main(then.split()[3:]) == 0
    assert re.search(r"digit.png  3 ", capfd.readouterr().out)


def test_the_next_command_names_a_picture_of_the_folder(train, capfd):
    write_folder(Path("my photos/train"), {"cat": 6, "dog": 6})
    words = ["data.name=folder", "data.root=my photos", "data.args={}", "data.image_size=8"]
    assert train(*words) == 0
    *_, then = lines_of(capfd)
    picture = re.fullmatch("next: python predict.py '(.*)'", then)[1]
    assert Path(picture).is_file()


def test_a_stop_is_told_first_then_what_was_saved_then_the_command(train, capfd, monkeypatch):
    original = Saver.between_steps

    def interrupt(saver: Saver) -> None:
        if saver.state.step == 6:
            signal.raise_signal(signal.SIGINT)
        original(saver)

    monkeypatch.setattr(Saver, "between_steps", interrupt)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    assert train() == 128 + signal.SIGINT
    assert lines_of(capfd)[-3:] == [
        "warning: stopped by SIGINT",
        "warning: saved: checkpoints/last.pth, after epoch 1 and 2 batches, step 6",
        "warning: go on with: python train.py --resume checkpoints/last.pth",
    ]


def test_a_finished_run_is_not_in_a_further_epoch(train, capfd):
    assert train() == 0
    capfd.readouterr()
    assert train("--resume") == 0
    said = capfd.readouterr().err
    assert "resumed from checkpoints/last.pth: finished after epoch 2, step 8 ====" in said
    assert "epoch 3" not in said


def test_fewer_epochs_than_are_done_are_told(train, capfd):
    assert train("train.epochs=3") == 0
    assert train("--resume", "train.epochs=2") == 0
    assert (
        "3 epochs are done, more than train.epochs=2: nothing is trained" in capfd.readouterr().err
    )


def test_a_folder_that_these_data_do_not_use_is_told(train, capfd):
    assert train("data.root=photos") == 0
    assert "warning: data.root is not used by data.name=synthetic" in capfd.readouterr().err


def test_the_least_loss_under_label_smoothing_is_told(train, capfd):
    assert train("loss.label_smoothing=0.1") == 0
    # Of 3 classes: the entropy of 0.9333, 0.0333 and 0.0333.
    assert "label smoothing 0.1, no loss is below 0.2911" in capfd.readouterr().err


def test_model_txt_has_the_shape_of_every_layers_output(train):
    assert train("model.name=lenet5", "data.image_size=28", "data.channels=1") == 0
    text = Path("logs/model.txt").read_text()
    table = dict(re.findall(r"^([\w.]+) +(1x[\dx]+)$", text, re.MULTILINE))
    assert "1x3" in table.values() and len(table) >= 5
    assert next(iter(table.values())).count("x") == 3, "an image's, at first"


# -- run={time} ------------------------------------------------------------------------------------


def test_a_run_may_be_named_by_its_time_and_is_found_again(train, capfd):
    assert train("run=a_{time}", "train.epochs=1") == 0
    (first,) = (path.name for path in Path("checkpoints").iterdir())
    assert re.fullmatch(r"a_\d{8}_\d{6}", first)
    assert f"run: {first}" in Path("logs", first, "config.yaml").read_text()
    assert train("run=a_{time}", "train.epochs=1") == 0, "another run"
    *_, last = sorted(path.name for path in Path("checkpoints").iterdir())
    assert last != first
    assert train("run=b_{time}", "train.epochs=1") == 0
    capfd.readouterr()
    assert train("--resume", "run=a_{time}", "train.epochs=2") == 0
    assert f"resumed from checkpoints/{last}/last.pth" in capfd.readouterr().err
    assert len(list(Path("checkpoints").iterdir())) == 3
    assert train("--resume", f"checkpoints/{first}/last.pth", "train.epochs=2") == 0
    assert f"resumed from checkpoints/{first}/last.pth: epoch 2" in capfd.readouterr().err
    assert len(list(Path("checkpoints").iterdir())) == 3


def test_two_runs_of_one_second_have_two_names(monkeypatch):
    seconds = iter(["20261127_120000"] * 3 + ["20261127_120001"])
    monkeypatch.setattr(time, "strftime", lambda *_: next(seconds))
    assert [new_name("{time}"), new_name("{time}")] == ["20261127_120000", "20261127_120001"]
    assert latest_name("{time}") is None, "neither has a checkpoint"
    monkeypatch.undo()
    with RunFolder("20261127_120000"):
        pass
    assert not Path("checkpoints/20261127_120000").exists(), "a run that leaves nothing"


def test_a_refused_run_leaves_no_folder(train):
    assert train("run={time}", "data.name=folder", "data.root=none") == 2
    assert not Path("checkpoints").exists() and not Path("logs").exists()


def test_a_file_has_the_time_in_quotes(train, capfd):
    Path("a.yaml").write_text(f"base: {TINY[1]}\nrun: {{time}}\n")
    assert train("--config", "a.yaml") == 2
    assert "text in braces needs quotes around it" in capfd.readouterr().err
    assert train("run={tiem}") == 2
    assert "expected a name of letters, digits, '_', '-', inner '.' and {time}, got" in (
        capfd.readouterr().err
    )
    Path("a.yaml").write_text(f'base: {TINY[1]}\nrun: "{{time}}"\n')
    assert train("--config", "a.yaml") == 0


def test_torchruns_processes_share_the_name(tmp_path):
    words = [*TINY, "run={time}", "train.epochs=1"]
    torchrun = Torchrun(tmp_path, ["--standalone", "--nproc-per-node=2"], *words)
    assert torchrun.wait() == 0, torchrun.output.read_text()
    assert len(list((tmp_path / "checkpoints").iterdir())) == 1
