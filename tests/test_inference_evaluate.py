"""evaluate.py: the figures that training reported, to the last digit; other data; what it refuses."""

import json
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY
from PIL import Image

import evaluate as script
import train as train_script
from cnn.inference.predictor import load
from cnn.metrics.scores import FROM_PROBABILITIES
from cnn.records import figures
from cnn.utils import outputs
from cnn.utils.checkpoint import load_checkpoint, save_checkpoint
from cnn.utils.run_folder import RunFolder
from cnn.utils.screen import display_width
from evaluate import as_text


def evaluate(*words: str) -> dict:
    """evaluate.py in this process; what it writes as JSON."""
    assert script.main([*words, "--json", "evaluated.json"]) == 0
    return json.loads(Path("evaluated.json").read_text(encoding="utf-8"))


def fill(root: str | Path, classes: str = "abc", number: int = 12, mode: str = "RGB") -> None:
    """Tiny images, a folder a class, each class about as bright as its letter is late."""
    draw = np.random.default_rng(len(str(root)))
    for letter in classes:
        folder = Path(root, letter)
        folder.mkdir(parents=True)
        for index in range(number):
            level = 60 * (ord(letter) - ord("a")) + draw.integers(0, 90, (9, 8, 3))
            image = Image.fromarray(level.astype(np.uint8)).convert(mode)
            image.save(folder / f"{letter}{index:02}.png")


PHOTOS = ["data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8"]


def folder_of_two() -> list[str]:
    fill("photos", "ab", 20)
    return [*PHOTOS, "checkpoint.monitor=val_auc"]


def table_with_a_model_that_draws() -> list[str]:
    fill("photos", "abc")
    files = sorted(Path("photos").glob("*/*.png"))
    lines = [f"{file},{file.parent.name},{'test' if n % 3 == 0 else ''}"
             for n, file in enumerate(files)]  # fmt: skip
    Path("labels.csv").write_text("\n".join(["path,label,split", *lines]))
    Path("a_model_that_draws.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(in_channels * 64, num_classes)\n"
        "    def forward(self, images):\n"
        "        return self.layer(nn.functional.dropout(images.flatten(1), 0.5, training=True))\n"
    )
    return ["data.name=csv", "data.root=labels.csv", "data.args={}", "data.image_size=8",
            "model.name=a_model_that_draws:Net", "model.args={}", "checkpoint.monitor=val_acc",
            "data.batch_size=2"]  # fmt: skip


def own_loss() -> list[str]:
    Path("a_loss_of_ones_own.py").write_text(
        "from torch import nn\n"
        "class Loss(nn.Module):\n"
        "    def forward(self, logits, labels):\n"
        "        return nn.functional.multi_margin_loss(logits, labels) * 3\n"
    )
    return ["loss.name=a_loss_of_ones_own:Loss", "data.in_memory=false", "data.num_workers=1"]


CONFIGURATIONS: dict[str, Callable[[], list[str]]] = {
    "digits": lambda: ["data.name=digits", "data.args={}", "data.batch_size=100"],
    "averaged, bf16": lambda: ["train.ema_decay=0.9", "train.precision=bf16", "train.epochs=3"],
    "weighted, smoothed": lambda: [
        *("loss.class_weights=balanced", "loss.label_smoothing=0.1", "optim.name=adamw"),
        *("optim.lr=0.3", "data.limit=20", "data.batch_size=3", "checkpoint.every_epochs=1"),
    ],
    "a folder of two classes": folder_of_two,
    "a table, a model that draws": table_with_a_model_that_draws,
    "a loss of one's own, image by image": own_loss,
}


def files_now() -> dict[str, int]:
    """Every file of the run, with the time of its last change."""
    folders = ("logs", "checkpoints", "configs")
    return {
        str(path): path.stat().st_mtime_ns for folder in folders for path in Path(folder).rglob("*")
    }


@pytest.mark.parametrize("configure", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
def test_what_training_reported_comes_out_to_the_last_digit(train, capfd, configure):
    assert train(*configure()) == 0
    best = load_checkpoint(Path("checkpoints/best.pth"))
    row = best["history"][best["best"]["epoch"] - 1]
    later = FROM_PROBABILITIES if best["temperature"] not in (None, 1) else ()
    reported = {name: value for name, value in row.items() if name.startswith("val_")}
    reported = {name: value for name, value in reported.items() if name[4:] not in later}
    written = json.loads(Path("logs/result.json").read_text())["test"]
    tested = load_checkpoint(Path("checkpoints/last.pth"))["test"]
    assert {name: written[name] for name in tested} == tested
    assert written.keys() - tested.keys() >= {"test_acc_95", "test_f1_95"}
    capfd.readouterr()
    before = files_now()

    validation, test = evaluate("--split", "val"), evaluate()
    assert {name: validation["metrics"][name] for name in reported} == reported
    assert test["metrics"] == written
    assert validation["reported"] == reported and test["reported"] == tested
    assert (
        capfd.readouterr().out.count("\ntraining reported the same figures, to the last digit\n")
        == 2
    )
    assert files_now() == before, "nothing of the run is touched"


def test_an_epoch_that_was_kept_is_evaluated_as_it_was(train):
    assert train("checkpoint.every_epochs=1", "train.epochs=3", "optim.lr=0.3") == 0
    history = load_checkpoint(Path("checkpoints/last.pth"))["history"]
    for row in history:
        path = f"checkpoints/epoch_{row['epoch']:03}.pth"
        metrics = evaluate("--checkpoint", path, "--split", "val")["metrics"]
        assert metrics["val_loss"] == row["val_loss"]


def test_the_weights_within_an_epoch_have_no_report_to_be_held_against(trained, capfd):
    content = load_checkpoint(Path("checkpoints/last.pth"))
    content["unfinished_epoch"]["batch"] = 1
    save_checkpoint(content, Path("checkpoints/within.pth"))
    for split in ("val", "test"):
        words = ["--checkpoint", "checkpoints/within.pth", "--split", split]
        assert evaluate(*words)["reported"] is None
    assert "after epoch 4 and 1 batches" in capfd.readouterr().err


def test_another_batch_size_is_told_as_the_reason_for_other_digits(train, capfd):
    assert train("train.precision=bf16", "model.args={width: 16}") == 0
    content = load_checkpoint(Path("checkpoints/best.pth"))
    content["history"][-1]["val_loss"] += 1e-9
    content["best"]["value"] = content["history"][-1]["val_loss"]
    save_checkpoint(content, Path("checkpoints/best.pth"))
    evaluate("--split", "val", "data.batch_size=3")
    said = capfd.readouterr().out
    assert "training reported val_loss" in said and "data.batch_size 16 → 3" in said
    evaluate("--split", "val")
    assert "(has the code changed?)" in capfd.readouterr().out


# ---------------------------------------------------------------------------------------------
# Other data


@pytest.fixture(scope="module")
def run_on_photos(tmp_path_factory) -> Path:
    """A run on a folder of three classes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("run"))
        fill("photos")
        assert train_script.main([*TINY, *PHOTOS, "train.epochs=4", "data.batch_size=4"]) == 0
        return Path.cwd()


@pytest.fixture
def trained(run_on_photos, folder_of_its_own) -> None:
    """The same, in the test's own folder."""
    shutil.copytree(run_on_photos, folder_of_its_own, dirs_exist_ok=True)


def test_data_that_were_moved_are_the_runs_own(trained, capfd):
    shutil.move("photos", "elsewhere")
    assert evaluate("data.root=elsewhere")["own_data"]
    assert "to the last digit" in capfd.readouterr().out


def test_of_other_images_all_count_each_under_its_own_name(trained, capfd):
    fill("others", "cb", 10)
    result = evaluate("data.root=others")
    assert (result["images"], result["own_data"], result["reported"]) == (20, False, None)
    assert [row["images"] for row in result["classes"]] == [0, 10, 10]
    assert result["classes"][0]["recall"] is None, "nothing was there to be measured"
    assert result["metrics"]["test_acc"] > 0.8, "the labels have the model's numbers"
    assert "all of others, other data than in training: 20 images" in capfd.readouterr().err


def test_other_data_have_their_own_test_images_and_need_nothing_to_train_on(trained):
    fill("others/test", "a", 5)
    result = evaluate("data.root=others")
    assert result["images"] == 5 and result["confusion_matrix"][0][0] >= 4


def test_a_gray_folder_is_decoded_to_the_models_colours(trained):
    fill("others", "ac", 5, "L")
    for memory in ("auto", "false"):
        assert evaluate("data.root=others", f"data.in_memory={memory}")["images"] == 10


def test_classes_of_another_order_are_taken_by_name(trained):
    Path("shuffled_classes.py").write_text(
        "import numpy as np\n"
        "def load(root):\n"
        "    items = [(np.full((8, 8, 3), 60 * (2 - n % 3) + 45, np.uint8), n % 3) for n in range(9)]\n"
        "    return {'train': items, 'test': items, 'classes': ['c', 'b', 'a']}\n"
    )
    result = evaluate("data.name=shuffled_classes:load")
    assert result["metrics"]["test_acc"] == 1.0


def refusal(capfd, *words: str) -> str:
    assert script.main(list(words)) == 2
    said = capfd.readouterr().err.splitlines()
    assert len([line for line in said if line.startswith("error: ")]) == 1
    return said[-1]


def test_classes_that_the_model_does_not_know_are_refused(trained, capfd):
    fill("others", "abd", 2)
    expected = "data.root: train has classes that the model has not: d; the model has a, b, c"
    assert expected in refusal(capfd, "data.root=others")
    expected = "data.name: it has classes that the model has not: 0, 1, 2"
    assert expected in refusal(capfd, "data.name=digits")


def test_pixels_of_other_channels_are_refused(train, capfd):
    assert train("data.name=digits", "data.args={}", "data.batch_size=300") == 0
    Path("ten_colours.py").write_text(
        "import numpy as np\n"
        "def load(root):\n"
        "    items = [(np.zeros((8, 8, 3), np.uint8), n) for n in range(10)]\n"
        "    return {'train': items, 'test': items, 'classes': range(10)}\n"
    )
    expected = "data.name: expected 1 channels, got 3"
    assert expected in refusal(capfd, "data.name=ten_colours:load")


def test_data_that_have_changed_are_refused_and_taken_with_a_warning_where_typed(trained, capfd):
    shutil.copy("photos/a/a00.png", "photos/a/new.png")
    said = refusal(capfd)
    assert "the data in photos has changed since the training" in said
    assert "type data.root=photos" in said
    assert evaluate("data.root=photos")["images"] == 37
    assert "images that were trained on may be among these" in capfd.readouterr().err


def test_other_data_get_the_class_weights_of_the_training(train):
    fill("photos", "ab", 20)
    for index in range(10):
        Path(f"photos/b/b{index:02}.png").unlink()
    assert train(*PHOTOS, "loss.class_weights=balanced") == 0
    assert load_checkpoint(Path("checkpoints/best.pth"))["class_weights"] == pytest.approx(
        [0.75, 1.5], rel=0.1
    )
    fill("others", "ab", 8)
    weighted = evaluate("data.root=others")["metrics"]["test_loss"]
    content = load_checkpoint(Path("checkpoints/best.pth"))
    content["class_weights"] = [1.0, 1.0]
    save_checkpoint(content, Path("plain.pth"))
    plain = evaluate("data.root=others", "--checkpoint", "plain.pth")["metrics"]["test_loss"]
    assert weighted != plain


# ---------------------------------------------------------------------------------------------
# What it says and leaves


def test_the_picture_is_drawn_where_it_is_asked_for(trained, capfd, monkeypatch):
    assert script.main(["--figure", "confusion.png"]) == 0
    with Image.open("confusion.png") as picture:
        assert min(picture.size) > 200
    monkeypatch.setattr(figures, "is_available", lambda: False)
    assert script.main(["--figure", "other.png"]) == 0
    assert "other.png is left out (pip install matplotlib)" in capfd.readouterr().err
    assert not Path("other.png").exists()


def test_a_file_that_cannot_be_written_is_told_and_ends_with_1(trained, capfd, monkeypatch):

    def full(path, write):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(outputs, "write_atomically", full)
    assert script.main(["--json", "a.json"]) == 1
    said = capfd.readouterr()
    assert "error: a.json: cannot be written: No space left on device" in said.err
    assert "Traceback" not in said.err and "test_acc" in said.out, (
        "the figures are seen all the same"
    )


def test_the_tables_columns_stand_below_each_other_in_chinese_too():
    matrix = np.array([[7, 1], [2, 40]])
    text = as_text({"test_acc": 0.94, "test_auc": None}, {}, matrix, ["猫", "golden retriever"])
    lines = text.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("class "))
    assert {display_width(line) for line in lines[start : start + 5]} == {
        display_width(lines[start])
    }
    assert "positive: golden retriever" in text and "test_auc  n/a" in text
    assert "golden retriever  taken for 猫" in text and "2 of 42" in text


def test_of_many_classes_the_worst_are_shown():
    matrix = np.diag(np.arange(1, 101))
    matrix[70, 3] = 100
    text = as_text({"test_acc": 0.5}, {}, matrix, [f"class {number}" for number in range(100)])
    assert "class 70 " in text and "class 3 " in text and "class 99 " not in text
    assert "(40 of 100 classes, the worst)" in text


def test_it_reads_a_run_that_is_going_on(trained):
    before = files_now()
    with RunFolder(None):  # as a run does
        evaluate("--split", "val")
    assert {k: v for k, v in files_now().items() if k.endswith((".pth", ".csv"))}.items() <= (
        before.items()
    )


def test_a_file_that_is_saved_again_and_again_is_never_read_torn(train):
    assert train("train.epochs=1") == 0
    path, done = Path("checkpoints/best.pth"), threading.Event()
    contents = [load_checkpoint(path), load_checkpoint(path)]
    contents[1]["environment"]["note"] = "larger" * 20_000  # and then small again

    def save() -> None:
        while not done.is_set():
            for content in contents:
                save_checkpoint(content, path)

    saving = threading.Thread(target=save)
    saving.start()
    try:
        stamps = set()
        for _ in range(8):
            stamps.add(path.stat().st_mtime_ns)
            load(path)
            evaluate()
    finally:
        done.set()
        saving.join()
    assert len(stamps) > 3, "it was saved meanwhile"


# ---------------------------------------------------------------------------------------------
# What it refuses


@pytest.mark.parametrize(
    "words, expected",
    [
        (
            ["optim.lr=3"],
            "command line: optim.lr: cannot be changed here, where only device, data.",
        ),
        (["data.rot=a"], "command line: data.rot: no such key — did you mean 'data.root'?"),
        (["device=gpu"], "command line: device: expected auto, cpu"),
        (["--json", "no/such.json"], "--json: expected a file in a folder that exists"),
        (["--json", "."], "--json: expected a file, got ., which is a folder"),
        (["--checkpoint", "b.pth"], "b.pth: no such file; train first: python train.py"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capfd, words, expected):
    assert expected in refusal(capfd, *words)


def test_a_missing_checkpoint_is_told_with_those_that_there_are(capfd):
    for path in ("checkpoints/best.pth", "checkpoints/a/best.pth"):
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).touch()
    said = refusal(capfd, "--checkpoint", "b.pth")
    assert "--checkpoint takes one of checkpoints/a/best.pth, checkpoints/best.pth" in said


def test_another_model_than_the_checkpoints_is_refused(trained, capfd):
    assert "a trained model keeps it" in refusal(capfd, "model.name=resnet9")


def test_a_damaged_file_is_refused_with_one_that_is_whole(trained, capfd):
    Path("checkpoints/best.pth").write_bytes(Path("checkpoints/best.pth").read_bytes()[:-1])
    said = refusal(capfd)
    assert "checkpoints/best.pth: damaged" in said
    assert "--checkpoint checkpoints/last.pth" in said and "--resume" not in said


def test_code_of_others_runs_only_where_it_is_typed(train, capfd):
    assert train("loss.name=torch.nn:CrossEntropyLoss", "train.epochs=1") == 0
    assert "type loss.name=torch.nn:CrossEntropyLoss" in refusal(capfd)
    evaluate("loss.name=torch.nn:CrossEntropyLoss")
    with pytest.raises(ValueError, match="type loss.name=torch.nn:CrossEntropyLoss"):
        load("checkpoints/best.pth")
    load("checkpoints/best.pth", "loss.name=torch.nn:CrossEntropyLoss")


def test_a_typo_is_answered_without_importing_torch():
    Path("a.png").touch()
    code = (
        "import sys, evaluate, predict\n"
        "for main in (evaluate.main, lambda words: predict.main(['a.png', *words])):\n"
        "    for words in (['--chekpoint', 'a'], ['optim.lr=1'], ['--checkpoint', 'a'], []):\n"
        "        try: status = main(words)\n"
        "        except SystemExit as ended: status = ended.code\n"
        "        assert status == 2 and 'torch' not in sys.modules, words\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": str(ROOT), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_precision_is_the_runs_but_on_another_kind_of_device(train):
    from cnn.inference.trained_model import load_trained_model

    assert train("train.precision=bf16", "train.epochs=1") == 0
    path = Path("checkpoints/best.pth")
    assert load_trained_model(path).precision == "bf16"
    assert load_trained_model(path, ["train.precision=fp32"]).precision == "fp32"
    content = load_checkpoint(path)
    content["environment"] |= {"device": "NVIDIA H200", "precision": "fp16"}
    save_checkpoint(content, path)
    assert load_trained_model(path, ["device=cpu"]).precision in ("fp32", "bf16"), "as auto chooses"
    content["environment"] |= {"device": "cpu"}
    save_checkpoint(content, path)
    assert load_trained_model(path, ["device=cpu"]).precision == "fp16", "as the figures were made"
    content["environment"] |= {"precision": "fp1"}
    save_checkpoint(content, path)
    assert load_trained_model(path, ["device=cpu"]).precision in ("fp32", "bf16")


def test_the_weights_are_those_that_were_validated(train):
    from cnn.inference.trained_model import load_trained_model

    assert train("train.ema_decay=0.9", "train.epochs=1") == 0
    path = Path("checkpoints/best.pth")
    content = load_checkpoint(path)
    weights = {k: v.cpu() for k, v in load_trained_model(path).model.state_dict().items()}
    assert all(torch.equal(weights[k], v) for k, v in content["ema_state_dict"].items())
    assert not all(torch.equal(weights[k], v) for k, v in content["model_state_dict"].items())
