"""Nothing but training moves a run: bookkeeping and evaluation leave model and loss as they were."""

import json
import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_run
from processes import Ranks, run, run_ranks

import evaluate as evaluate_script
from cnn.training.saver import Saver
from cnn.utils.checkpoint import load_checkpoint

MODULES = """
import torch
from torch import nn
from torch.nn.utils import spectral_norm


class Counting(nn.Module):
    '''Counts its forward passes, in training and in evaluation, and computes with the number.'''

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.layer = nn.Linear(in_channels * 64, num_classes)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def forward(self, images):
        self.passes += 1
        return self.layer(images.flatten(1)) * (1 + self.passes / 100)




class Drifting(nn.Module):
    '''A loss that moves whenever it is asked.'''

    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, logits, labels):
        self.calls += 1
        return nn.functional.cross_entropy(logits, labels) * (1 + self.calls / 100)


class Spectral(nn.Module):
    '''Its weight is no leaf of the graph, which torch refuses to copy.'''

    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.layer = spectral_norm(nn.Linear(in_channels * 64, num_classes))

    def forward(self, images):
        return self.layer(images.flatten(1))
"""
COUNTING = [*TINY, "model.name=mine:Counting", "model.args={}"]
# 9 batches of training in 3 epochs, then 3 of validation in each and 3 of the test.
LONGER = [
    *("train.epochs=3", "data.val_fraction=0.6"),
    "data.args={num_images: 110, num_test: 70, num_classes: 3, image_size: 8, noise: 60}",
]


@pytest.fixture(autouse=True)
def modules(folder_of_its_own: Path) -> None:
    put_modules(folder_of_its_own)


def put_modules(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "mine.py").write_text(MODULES)
    return folder


def test_only_the_passes_of_training_are_in_a_model_that_counts_them():
    status, output = run(Path.cwd(), *COUNTING, "log.tensorboard=true", "train.epochs=3")
    assert status == 0, output
    assert run(Path.cwd(), "--resume", "train.epochs=5")[0] == 0
    last = load_checkpoint(Path("checkpoints/last.pth"))
    assert last["model_state_dict"]["passes"] == last["step"] == 20


@pytest.mark.parametrize("place, passes", [("validation", 4), ("validation", 19)])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_stopped_in_validation_or_test_what_moves_there_goes_on_bit_for_bit(place, passes, number):
    words = [*COUNTING, *LONGER, "loss.name=mine:Drifting", "checkpoint.every_steps=1"]
    words += ["train.ema_decay=0.9"] if passes == 19 else []
    whole, stopped = put_modules(Path.cwd() / "whole"), put_modules(Path.cwd() / "stopped")
    assert run(whole, *words)[0] == 0
    status, output = run(stopped, *words, trap=(place, passes, number))
    assert status == (128 + number if number == signal.SIGTERM else -number), output
    status, output = run(stopped, "--resume")
    assert status == 0, output
    assert_same_run(whole, stopped)


def test_the_weights_that_are_tested_need_no_copy_of_the_model():
    """Of two processes one has no batch of validation: its weights are still in a graph."""
    words = [*TINY, "model.name=mine:Spectral", "model.args={}", "data.batch_size=32"]
    assert "Traceback" not in run_ranks(2, Path.cwd(), *words)


# -- the figures of the best epoch are its own, or there are none --------------------------------

BEST_BEFORE_LAST = ["train.epochs=5", "optim.lr=0.8", "seed=1"]


def result() -> dict:
    return json.loads(Path("logs/result.json").read_text())


def test_a_best_epoch_that_is_only_in_memory_is_tested_all_the_same(train, monkeypatch):
    assert train(*BEST_BEFORE_LAST) == 0
    expected = result()
    assert expected["best"]["epoch"] < 5
    monkeypatch.setattr(
        "cnn.utils.checkpoint.save_checkpoint",
        lambda *_: (_ for _ in ()).throw(OSError(28, "full")),
    )
    assert train(*BEST_BEFORE_LAST) == 1  # nothing could be saved
    assert result() == expected


@pytest.mark.parametrize("kept", [True, False])
def test_a_best_pth_that_has_gone_bad_is_tested_from_another_file_or_not_at_all(
    train, capfd, monkeypatch, kept
):
    original = Saver.load_best

    def spoil_first(saver: Saver, model: torch.nn.Module) -> None:
        saver.writer.wait()
        data = bytearray(saver.folder.best.read_bytes())
        data[len(data) // 2] ^= 1
        saver.folder.best.unlink()  # epoch_004.pth may be another name of the same file
        saver.folder.best.write_bytes(data)
        original(saver, model)

    words = [*BEST_BEFORE_LAST, *(["checkpoint.every_epochs=1"] if kept else [])]
    assert train(*words) == 0
    expected = result()
    shutil.rmtree("configs")
    monkeypatch.setattr(Saver, "load_best", spoil_first)
    assert train(*words) == (0 if kept else 1)
    said = capfd.readouterr().err
    assert "best.pth: damaged" in said and "Traceback" not in said
    if kept:
        assert result() == expected
    else:
        assert "are in no file that can be read: no test" in said
        assert result()["test"] is None and result()["best"] is None
        assert not list(Path("configs").rglob("*.yaml"))
        assert load_checkpoint(Path("checkpoints/last.pth"))["test"] is None


def test_two_processes_whose_best_epoch_is_lost_both_fail(tmp_path):
    (tmp_path / "lost.py").write_text(
        "from pathlib import Path\n"
        "from cnn.training.saver import Saver\n"
        "import torch\n"
        "original = Saver.load_best\n"
        "def load_best(saver, model):\n"
        "    saver.writer.wait()\n"
        "    if saver.run.group.is_rank0:\n"
        "        for path in Path('checkpoints').glob('*.pth'): path.unlink()\n"
        "    original(saver, model)\n"
        "Saver.load_best = load_best\n"
        "def flip(image): return image\n"
    )
    ranks = Ranks(2, tmp_path, *TINY, "data.augment=[lost:flip]")
    statuses = ranks.wait()
    assert statuses[0] == 1 and 0 not in statuses, ranks.output()
    assert "Traceback" not in ranks.output()


# -- models that are odd ----------------------------------------------------------------------------


def test_what_a_module_keeps_beside_its_tensors_is_the_best_epochs_in_every_process(
    train, tmp_path
):
    """Rank 1 tests with what rank 0 has read; alone, evaluate.py finds the same."""
    (tmp_path / "beside.py").write_text(
        "from torch import nn\n"
        "class Beside(nn.Sequential):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__(nn.Flatten(), nn.Linear(in_channels * 64, num_classes))\n"
        "        self.steps = 0\n"
        "    def forward(self, images):\n"
        "        self.steps += self.training\n"
        "        return super().forward(images) * (1 + self.steps / 10)\n"
        "    def get_extra_state(self):\n"
        "        return self.steps\n"
        "    def set_extra_state(self, state):\n"
        "        self.steps = state\n"
    )
    words = [*TINY, "model.name=beside:Beside", "model.args={}", "train.epochs=6", "optim.lr=0.5"]
    output = run_ranks(2, tmp_path, *words)
    assert "best checkpoint: checkpoints/best.pth" in output
    assert result()["best"]["epoch"] < 6, output
    tested = result()["test"]
    assert evaluate_script.main(["--json", "evaluated.json"]) == 0
    evaluated = json.loads(Path("evaluated.json").read_text())["metrics"]
    assert evaluated["test_loss"] == pytest.approx(tested["test_loss"], rel=1e-6)


def test_modules_that_know_their_version_train_resume_and_predict(train):
    words = ["model.name=mnasnet0_5", "model.args={}", "data.batch_size=64", "optim.lr=0.01"]
    assert train(*words, "train.epochs=1") == 0
    assert train("--resume", "train.epochs=2") == 0
    assert evaluate_script.main([]) == 0


def test_a_buffer_that_could_not_be_put_back_is_told_as_that(train, capfd):
    Path("growing.py").write_text(
        "import torch\n"
        "class Growing(torch.nn.Linear):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__(in_channels * 64, num_classes)\n"
        "        self.register_buffer('seen', torch.zeros(1))\n"
        "    def forward(self, images):\n"
        "        self.seen = torch.zeros(len(images))\n"
        "        return super().forward(images.flatten(1))\n"
    )
    assert train("model.name=growing:Growing", "model.args={}") == 2
    said = capfd.readouterr().err
    assert "Growing: what its forward pass changes can neither be put back" in said
    assert "size mismatch for seen" in said and "Traceback" not in said
