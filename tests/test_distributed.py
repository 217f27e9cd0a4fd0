"""Several processes that train together: the same images, the same bits, whichever is killed."""

import shutil
import signal
from pathlib import Path

import pytest
import torch
from conftest import TINY, assert_same_run, history
from processes import Ranks, run, run_ranks, trained_on
from torch import nn

from cnn.datasets.loading import share_of
from cnn.utils.checkpoint import load_checkpoint

# Batches of 11 images, which no number of processes divides; the last of the epoch has 4.
UNEVEN = [
    *TINY,
    *("data.batch_size=11", "data.val_fraction=0.3", "checkpoint.every_steps=1"),
    "data.args={num_images: 110, num_test: 71, num_classes: 3, image_size: 8, noise: 60}",
]
PLAIN = [*UNEVEN, "model.name=plain:Plain", "model.args={}"]
RICH = [
    *UNEVEN,
    *("train.ema_decay=0.7", "train.precision=bf16", "train.accumulate=2", "train.epochs=3"),
    *("schedule.name=cosine", "train.clip_grad_norm=1", "loss.class_weights=[1, 2, 0.5]"),
]
STREAM = [*RICH, "data.in_memory=false"]


class Plain(nn.Module):
    """Neither dropout nor BatchNorm: nothing that goes by a process's share."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(288, num_classes)
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, 8, 8
        return self.layers(images)


@pytest.fixture(autouse=True)
def plain_model(tmp_path: Path) -> None:
    put_model(tmp_path)


def put_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plain.py").write_text("from test_distributed import Plain\n")


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken")
    run_ranks(2, folder, *RICH)
    return folder


@pytest.mark.parametrize("number", [1, 2, 3, 5, 8, 11, 64])
@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 40])
def test_the_shares_make_up_the_batch_and_none_is_of_one_image(number, ranks):
    shares = [share_of(number, rank, ranks) for rank in range(ranks)]
    counted = [i for start, _, own in shares for i in range(start, start + own)]
    assert counted == list(range(number))
    assert all(end - start >= min(2, number) for start, end, _ in shares)
    own = [own for *_, own in shares if own]
    assert max(own) - min(own) <= 1


@pytest.mark.parametrize("memory", ["auto", "false"])
def test_every_step_has_the_same_images_and_the_same_loss_however_many_compute_it(tmp_path, memory):
    words = [*PLAIN, f"data.in_memory={memory}"]
    found = {}
    for size in (1, 2, 3):
        folder = tmp_path / str(size)
        put_model(folder)
        run_ranks(size, folder, *words)
        found[size] = trained_on(folder, size)
    for size in (2, 3):
        assert found[size].keys() == found[1].keys() and len(found[1]) == 14
        for place, batch in found[1].items():
            assert found[size][place]["images"] == batch["images"]
            assert found[size][place]["loss_sum"] == pytest.approx(batch["loss_sum"], rel=1e-5)


def test_two_processes_repeat_themselves_bit_for_bit(unbroken, tmp_path):
    run_ranks(2, tmp_path, *RICH)
    assert_same_run(unbroken, tmp_path)


def test_the_evaluation_is_equal_to_the_last_bit_however_many_share_it(tmp_path):
    words = [*UNEVEN, "train.epochs=1", "data.batch_size=6", "checkpoint.monitor=val_auc"]
    trap = ("before validation", 0, signal.SIGTERM)
    assert run(tmp_path / "1", *words, "loss.class_weights=[1, 2, 0.5]", trap=trap)[0] == 143
    for size in (2, 3):
        shutil.copytree(tmp_path / "1", tmp_path / str(size))
        run_ranks(size, tmp_path / str(size), "--resume")
    assert run(tmp_path / "1", "--resume")[0] == 0
    for size in (2, 3):
        assert history(tmp_path / "1") == history(tmp_path / str(size))
        one, other = (
            load_checkpoint(tmp_path / name / "checkpoints/last.pth") for name in ("1", str(size))
        )
        assert one["test"] == other["test"]
        for split in ("val", "test"):
            for name, said in one["predictions"][split].items():
                assert torch.equal(said, other["predictions"][split][name])


PHASES = {
    "training": (1, "training", 3),
    "validation": (1, "validation", 14),
    "the first, while it writes": (0, "writing", 2),
    "the first, before last.pth is renamed": (0, "before last.pth is renamed", 3),
    "before the test": (1, "before the test", 0),
}


@pytest.mark.parametrize("rank, place, passes", PHASES.values(), ids=PHASES)
def test_a_run_of_which_one_process_is_killed_ends_the_same(
    unbroken, tmp_path, rank, place, passes
):
    ranks = Ranks(2, tmp_path, *RICH, traps={rank: (place, passes, signal.SIGKILL)})
    statuses = ranks.wait()
    assert statuses[rank] == -signal.SIGKILL and statuses[1 - rank] in (1, -6), ranks.output()
    assert "another process of this run is gone" in ranks.output()
    assert "Traceback" not in ranks.output()
    has_begun = (tmp_path / "checkpoints/last.pth").exists()
    run_ranks(2, tmp_path, *([] if has_begun else RICH), "--resume")
    assert_same_run(unbroken, tmp_path)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("place, passes", [("training", 3), ("before validation", 1)])
def test_a_signal_to_one_process_stops_all_at_the_same_step(
    unbroken, tmp_path, rank, place, passes
):
    words = [*RICH, "checkpoint.every_steps=null"]
    ranks = Ranks(2, tmp_path, *words, traps={rank: (place, passes, signal.SIGTERM)})
    assert ranks.wait() == [143, 143], ranks.output()
    assert "rank 1: stopped by SIGTERM" in (tmp_path / "logs/train.log").read_text()
    run_ranks(2, tmp_path, "--resume")
    assert_same_run(unbroken, tmp_path)


def test_the_images_go_on_where_they_were_with_another_number_of_processes(tmp_path):
    put_model(tmp_path / "whole")
    run_ranks(1, tmp_path / "whole", *PLAIN)
    ranks = Ranks(2, tmp_path, *PLAIN, traps={1: ("training", 2, signal.SIGTERM)})
    assert ranks.wait() == [143, 143], ranks.output()
    first = trained_on(tmp_path, 2)
    for path in tmp_path.glob("trained_*"):
        path.unlink()
    output = run_ranks(3, tmp_path, "--resume")
    assert "not as before: world_size 2 → 3" in output
    rest = trained_on(tmp_path, 3)
    whole = trained_on(tmp_path / "whole", 1)
    assert not first.keys() & rest.keys() and len(first) == 3
    assert {place: batch["images"] for place, batch in (first | rest).items()} == {
        place: batch["images"] for place, batch in whole.items()
    }
    for one, other in zip(history(tmp_path), history(tmp_path / "whole")):
        for name, value in one.items():
            assert float(value) == pytest.approx(float(other[name]), rel=1e-4)


def test_only_the_first_process_talks(tmp_path):
    output = run_ranks(2, tmp_path, *UNEVEN, "train.epochs=1")
    assert "epoch 1/1" in output
    assert (tmp_path / "output_1.txt").read_text() == ""
    assert "rank" not in (tmp_path / "logs/train.log").read_text()
