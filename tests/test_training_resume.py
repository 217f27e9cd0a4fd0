"""As if it had never stopped: runs killed, signalled and resumed equal the unbroken one, bit for bit."""

import itertools
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch
from archives import content
from conftest import TINY, assert_same_run, history
from PIL import Image, ImageOps
from processes import run, run_through_kills
from test_training_runs import write_folder

from cnn.errors import Stopped
from cnn.training.saver import Saver
from cnn.utils import checkpoint
from cnn.utils.checkpoint import load_checkpoint

# Everything that has state: EMA, bf16, dropout, accumulation that does not divide the epoch. Each of
# 3 epochs has 3 batches in 2 steps, then 3 batches of validation; the test has 3.
RICH = [
    *TINY,
    *("train.ema_decay=0.7", "train.precision=bf16", "train.accumulate=2", "train.epochs=3"),
    *("schedule.name=cosine", "schedule.warmup_epochs=0.5", "checkpoint.every_steps=1"),
    "data.args={num_images: 110, num_test: 70, num_classes: 3, image_size: 8, noise: 60}",
    "data.val_fraction=0.6",
]
STREAM = [*RICH, "data.in_memory=false"]  # image by image, with worker processes


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    return run_whole(tmp_path_factory.mktemp("unbroken"), *RICH)


@pytest.fixture(scope="module")
def unbroken_stream(tmp_path_factory) -> Path:
    return run_whole(tmp_path_factory.mktemp("unbroken_stream"), *STREAM)


def run_whole(folder: Path, *words: str) -> Path:
    status, output = run(folder, *words)
    assert status == 0, output
    return folder


def resume_to_the_end(folder: Path, *words: str) -> str:
    status, output = run(folder, "--resume", *words)
    assert status == 0, output
    return output


PHASES = {  # a place, and how often the run passes it before it is killed there
    "training": ("training", 2),
    "between training and validation": ("before validation", 1),
    "in the middle of validation": ("validation", 4),
    "after validation, before any save": ("after the epoch", 1),
    "while the state is copied": ("copying", 40),
    "while the file is written": ("writing", 2),
    "before best.pth is renamed": ("before best.pth is renamed", 0),
    "between best.pth and last.pth": ("before last.pth is renamed", 2),
    "before the final test": ("before the test", 0),
    "during the final test": ("validation", 19),
}


@pytest.mark.parametrize("place, passes", PHASES.values(), ids=PHASES)
def test_a_run_killed_in_any_phase_ends_the_same(unbroken, tmp_path, place, passes):
    status, output = run(tmp_path, *RICH, trap=(place, passes, signal.SIGKILL))
    assert status == -signal.SIGKILL, output
    if (tmp_path / "checkpoints/last.pth").exists():
        resume_to_the_end(tmp_path)
    else:  # nothing was saved yet: the one command line starts anew
        resume_to_the_end(tmp_path, *RICH)
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize(
    "name, place, passes",
    [
        *itertools.product(["SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP"], ["training"], [2]),
        ("SIGTERM", "validation", 4),
        ("SIGINT", "writing", 1),
    ],
)
def test_a_signal_to_the_group_saves_and_says_how_to_go_on(
    unbroken_stream, tmp_path, name, place, passes
):
    number = getattr(signal, name)
    words = [*STREAM, "data.num_workers=2", "checkpoint.every_steps=null"]
    status, output = run(tmp_path, *words, trap=(place, passes, number))
    assert status == 128 + number, output
    assert f"stopped by {name}" in output and "Traceback" not in output
    assert "go on with: python train.py --resume checkpoints/last.pth" in output
    resume_to_the_end(tmp_path, "checkpoint.every_steps=1")
    assert_same_run(unbroken_stream, tmp_path)


def test_under_nohup_a_run_outlives_its_terminal(train, monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        original = Saver.between_steps

        def hang_up(saver: Saver) -> None:
            signal.raise_signal(signal.SIGHUP)
            original(saver)

        monkeypatch.setattr(Saver, "between_steps", hang_up)
        assert train() == 0
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_leaves_at_once(tmp_path):
    Path("mine.py").write_text(
        "import os, signal, time\n"
        "def stuck(image):\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(0.1)\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "    time.sleep(60)\n"
    )
    status, output = run(tmp_path, *TINY, "data.augment=[mine:stuck]")
    assert status == 130, output


@pytest.mark.parametrize("before, after", [(0, 3), (2, 1), (3, 0)])
def test_another_number_of_workers_after_a_kill_changes_nothing(
    unbroken_stream, tmp_path, before, after
):
    workers = f"data.num_workers={before}"
    status, output = run(tmp_path, *STREAM, workers, trap=("training", 2, signal.SIGKILL))
    assert status == -signal.SIGKILL, output
    resume_to_the_end(tmp_path, f"data.num_workers={after}")
    assert_same_run(unbroken_stream, tmp_path)


UNSURE = """
from torch import nn

class Unsure(nn.Linear):
    def __init__(self, num_classes, in_channels):
        super().__init__(in_channels * 64, num_classes)
    def forward(self, images):
        return super().forward(nn.functional.dropout(images.flatten(1), 0.5, training=True))
"""


def test_a_model_that_draws_in_validation_does_so_by_seed_epoch_and_batch(tmp_path):
    words = [*STREAM, "model.name=unsure:Unsure", "model.args={}", "checkpoint.every_steps=null"]
    for name in ("whole", "killed", "workers"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "unsure.py").write_text(UNSURE)
    run_whole(tmp_path / "whole", *words)
    assert len({row["val_loss"] for row in history(tmp_path / "whole")}) == 3
    run_whole(tmp_path / "workers", *words, "data.num_workers=2")
    assert_same_run(tmp_path / "whole", tmp_path / "workers")
    trap = ("validation", 4, signal.SIGTERM)
    assert run(tmp_path / "killed", *words, trap=trap)[0] == 128 + signal.SIGTERM
    resume_to_the_end(tmp_path / "killed")
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_what_is_saved_is_the_state_at_the_call_and_not_later(tmp_path, monkeypatch):
    going_on = threading.Event()
    written = checkpoint.save_checkpoint

    def slow_disk(*args):
        going_on.wait(10)
        written(*args)

    monkeypatch.setattr(checkpoint, "save_checkpoint", slow_disk)
    weights = torch.zeros(3)
    writer = checkpoint.CheckpointWriter()
    writer.save(content() | {"model_state_dict": {"weights": weights}}, tmp_path / "last.pth")
    weights += 1  # the next step, while the file is being written
    going_on.set()
    writer.wait()
    saved = torch.load(tmp_path / "last.pth", weights_only=True)
    assert torch.equal(saved["model_state_dict"]["weights"], torch.zeros(3))


def test_every_position_resumes_to_the_same_end(train, monkeypatch):
    """A run of 20 steps, stopped after each; then resumed from each of the 20 files."""
    words = ["train.epochs=4", "data.args={num_images: 80, image_size: 8}", "optim.lr=0.02"]
    words = [*words, "train.ema_decay=0.9", "schedule.name=plateau", "schedule.patience=0"]
    assert train(*words) == 0
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path("whole", folder))
    original = Saver.between_steps

    def stop_after_each(saver: Saver) -> None:
        original(saver)
        raise Stopped(signal.SIGTERM)

    with monkeypatch.context() as cut_short:
        cut_short.setattr(Saver, "between_steps", stop_after_each)
        status, number = train(*words), 0
        while status != 0:
            number += 1
            shutil.copytree("checkpoints", f"at/{number}/checkpoints")
            status = train("--resume")
    assert number == 20
    assert_same_run("whole", ".")
    for number in range(1, 21):
        monkeypatch.chdir(Path("at", str(number)))
        assert train("--resume") == 0
        monkeypatch.chdir("../..")
        assert_same_run("whole", Path("at", str(number)))


def test_resume_without_a_file_starts_where_there_is_none(tmp_path):
    status, output = run(tmp_path, *TINY, "--resume")
    assert status == 0 and "a new run starts" in output


def test_an_unreadable_last_pth_falls_back_to_the_next_best(unbroken, tmp_path):
    assert run(tmp_path, *RICH, trap=("before the test", 0, signal.SIGKILL))[0] == -9
    last = tmp_path / "checkpoints/last.pth"
    last.write_bytes(last.read_bytes()[:-1000])
    output = resume_to_the_end(tmp_path)
    assert "last.pth: damaged: the file is cut off" in output
    assert "going on from checkpoints/best.pth instead" in output
    assert_same_run(unbroken, tmp_path)


def test_the_log_is_one_story_and_marks_each_resume(unbroken, tmp_path):
    # At the second step of epoch 2: the first one's save has waited for that of epoch 1.
    run(tmp_path, *RICH, trap=("training", 3, signal.SIGKILL))
    resume_to_the_end(tmp_path)
    log = (tmp_path / "logs/train.log").read_text()
    assert log.count("==== resumed from checkpoints/last.pth: epoch 2, ") == 1
    assert [log.count(f"epoch {epoch}/3  train loss") for epoch in (1, 2, 3)] == [1, 1, 1]
    assert history(tmp_path) == history(unbroken)


def test_a_best_epoch_is_never_replaced_by_a_worse_one_after_a_resume(train):
    assert train("train.epochs=6", "optim.lr=0.02", "data.augment=[]") == 0
    best = load_checkpoint(Path("checkpoints/best.pth"))
    assert train("--resume", "train.epochs=7", "optim.lr=30") == 0
    assert load_checkpoint(Path("checkpoints/best.pth"))["epoch"] == best["epoch"]
    assert load_checkpoint(Path("checkpoints/last.pth"))["best"] == best["best"]


def test_going_on_from_an_earlier_file_tests_its_own_best_epoch(train):
    words = ["train.epochs=6", "optim.lr=0.02", "checkpoint.every_epochs=1"]
    assert train(*words, "data.augment=[]") == 0
    assert train("--resume", "checkpoints/epoch_002.pth", "train.epochs=2") == 0
    last = load_checkpoint(Path("checkpoints/last.pth"))
    best = load_checkpoint(Path("checkpoints/best.pth"))
    assert best["epoch"] == last["best"]["epoch"] <= 2
    assert not Path("checkpoints/epoch_006.pth").exists()  # of the way not taken: in the archive
    assert list(Path("checkpoints/archive").glob("*/epoch_006.pth"))
    assert list(Path("checkpoints/archive").glob("*/history.csv"))


def test_a_run_whose_losses_are_no_numbers_is_not_saved(train, capfd):
    words = ["data.batch_size=1000", "optim.lr=1e30", "train.precision=fp32"]
    assert train(*words) == 1
    said = capfd.readouterr().err
    assert "no longer a number" in said and "go on with" not in said
    assert not Path("checkpoints/last.pth").exists()


def test_plateau_settings_typed_on_a_resume_are_taken(train):
    words = ["schedule.name=plateau", "optim.lr=1e-6", "checkpoint.monitor=val_acc"]
    assert train(*words, "train.epochs=2") == 0
    assert train("--resume", "train.epochs=10", "schedule.patience=0", "schedule.gamma=0.5") == 0
    assert float(history(".")[-1]["lr"]) < 0.5e-6


def test_the_weights_that_a_run_began_with_may_be_gone(train):
    assert train("train.epochs=1") == 0
    shutil.copy("checkpoints/last.pth", "w.pth")
    assert train("model.weights=w.pth", "train.epochs=1") == 0
    Path("w.pth").unlink()
    assert train("--resume", "train.epochs=2") == 0


def test_a_loss_with_state_goes_on_with_it(train):
    Path("stateful_loss.py").write_text(
        "import torch\n"
        "class Loss(torch.nn.Module):\n"
        "    def __init__(self):\n"
        "        super().__init__()\n"
        "        self.register_buffer('scale', torch.ones(()))\n"
        "    def forward(self, logits, labels):\n"
        "        if torch.is_grad_enabled():\n"
        "            self.scale *= 0.9\n"
        "        return torch.nn.functional.cross_entropy(self.scale * logits, labels)\n"
    )
    assert train("loss.name=stateful_loss:Loss", "train.epochs=4") == 0
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path("whole", folder))
    assert train("loss.name=stateful_loss:Loss", "train.epochs=2") == 0
    assert train("--resume", "train.epochs=4") == 0
    assert_same_run("whole", ".")


def test_images_changed_under_the_same_names_are_noticed(train, capfd):
    write_folder(Path("photos"), {"cat": 9, "dog": 9})
    assert train("data.name=folder", "data.root=photos", "data.args={}") == 0
    status = os.stat("photos/dog/1.jpg")
    with Image.open("photos/dog/1.jpg") as image:
        ImageOps.mirror(image).save("photos/dog/1.png")  # the same sums of pixels
    os.replace("photos/dog/1.png", "photos/dog/1.jpg")
    os.utime("photos/dog/1.jpg", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert train("--resume", "train.epochs=3") == 2
    assert "the data has changed since (as many images, but other" in capfd.readouterr().err


def test_the_statistics_of_a_dataset_that_draws_are_the_same_every_time(train):
    Path("drawing.py").write_text(
        "import numpy as np\n"
        "class Set:\n"
        "    targets = [n % 2 for n in range(60)]\n"
        "    def __len__(self):\n"
        "        return 60\n"
        "    def __getitem__(self, n):\n"
        "        return np.random.randint(0, 255, (8, 8), dtype=np.uint8), self.targets[n]\n"
        "def load(root):\n"
        "    return {'train': Set(), 'classes': ['a', 'b']}\n"
    )
    means = []
    for _ in range(2):
        assert train("data.name=drawing:load", "data.args={}", "train.epochs=1") == 0
        means.append(load_checkpoint(Path("checkpoints/last.pth"))["preprocessing"]["mean"])
    assert means[0] == means[1]


# -- the soak: random kills at random times ---------------------------------------------------

SOAKS = {
    "from memory, dropout, augmentation": ["data.augment=[crop, flip, erase]"],
    "two workers": ["data.num_workers=2", "data.augment=[crop, flip, rotate]"],
    "ema, bf16, accumulation": [
        *("train.ema_decay=0.9", "train.precision=bf16", "train.accumulate=3"),
        *("schedule.name=onecycle", "optim.name=adamw", "optim.lr=0.01"),
    ],
    "plateau, early stopping": [
        *("schedule.name=plateau", "schedule.patience=0", "train.early_stop_patience=3")
    ],
    "fp16, clipping": ["train.precision=fp16", "train.clip_grad_norm=0.5"],
    "folder, two workers": [
        *("data.name=folder", "data.args={}", "data.num_workers=2", "data.image_size=12"),
        "data.augment=[resized_crop, flip]",
    ],
}


def unbroken_soak(tmp_path: Path, name: str) -> list[str]:
    """The words of a run, which has been there unbroken then."""
    settings = SOAKS[name]
    if name.startswith("folder"):
        if not (tmp_path / "photos").exists():
            write_folder(tmp_path / "photos", {"cat": 30, "dog": 30, "bird": 30})
        settings = [*settings, f"data.root={tmp_path / 'photos'}"]
    words = [*TINY, "train.epochs=6", "checkpoint.every_steps=2", *settings]
    run_whole(tmp_path / "reference", *words)
    return words


def soak(tmp_path: Path, words: list[str], seed: int, longest: float) -> int:
    """One run under random kills against the unbroken one; returns the number of kills."""
    folder = tmp_path / f"killed_{seed}"
    signals = [signal.SIGKILL, signal.SIGKILL, signal.SIGTERM]
    kills, status = run_through_kills(folder, *words, seed=seed, longest=longest, signals=signals)
    assert status == 0, (folder / "output.txt").read_text()
    assert_same_run(tmp_path / "reference", folder)
    shutil.rmtree(folder)
    return kills


def test_random_kills_change_nothing(tmp_path):
    """The short form: at least 6 kills over three kinds of run."""
    kills = 0
    assert run(tmp_path, "--print-config")[0] == 0  # the server has imported all by then
    for number, name in enumerate(list(SOAKS)[:3]):
        folder, seed, began = tmp_path / str(number), 0, time.monotonic()
        words = unbroken_soak(folder, name)
        longest = 2 * (time.monotonic() - began)  # so that half of them, however busy it is, end
        while kills < 2 * (number + 1):
            kills += soak(folder, words, seed := seed + 1, longest)
    print(f"{kills} kills")


@pytest.mark.soak
@pytest.mark.parametrize("name", SOAKS)
def test_many_random_kills_change_nothing(tmp_path, name):
    kills, seed, words = 0, 1000, unbroken_soak(tmp_path, name)
    while kills < 35:
        kills += soak(tmp_path, words, seed := seed + 1, longest=0.8)
        print(f"{name}: seed {seed}, {kills} kills")
