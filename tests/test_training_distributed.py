"""Several processes that train together: the same images, the same bits, whichever is killed."""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import ROOT, TINY, assert_same_run, history
from processes import Ranks, free_port, run, run_ranks, trained_on, wait_for_listener
from test_datasets_pictures import assert_same_figures, write_photographs
from torch import nn

from cnn.datasets.cache import cache_folder
from cnn.datasets.order import share_of
from cnn.utils.checkpoint import load_checkpoint

# Batches of 11 images, which no number of processes divides; the last of the epoch has 4.
UNEVEN = [
    *TINY,
    *("data.batch_size=11", "data.val_fraction=0.3", "checkpoint.every_steps=1"),
    "data.args={num_images: 114, num_test: 71, num_classes: 3, image_size: 8, noise: 60}",
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


class Noisy(Plain):
    """Draws in evaluation too."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return super().forward(images + torch.randn_like(images))


class Centred(Plain):
    """Keeps a mean of the images that it has seen, and computes with it: a buffer that matters."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__(num_classes, in_channels)
        self.norm = nn.BatchNorm2d(in_channels)
        self.register_buffer("mean", torch.zeros(in_channels, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if self.training:
            self.mean.lerp_(images.mean((0, 2, 3))[:, None, None], 0.3)
        return super().forward(self.norm(images) - self.mean)


class Remembering(nn.Module):
    """A loss with a state: it changes with the labels that a process sees."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if torch.is_grad_enabled():
            self.mean.lerp_(labels.float().mean(), 0.3)
        return nn.functional.cross_entropy(logits, labels) * (1 + self.mean)


@pytest.fixture(autouse=True)
def plain_model(tmp_path: Path) -> None:
    put_model(tmp_path)


def put_model(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plain.py").write_text(
        "from test_training_distributed import Centred, Noisy, Plain, Remembering\n"
    )
    (folder / "fails_at_40.py").write_text(OWN_DATA)


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
        assert found[size].keys() == found[1].keys() and len(found[1]) == 16
        for place, batch in found[1].items():
            assert found[size][place]["images"] == batch["images"]
            assert found[size][place]["loss"] == pytest.approx(batch["loss"], rel=1e-5)


def test_two_processes_repeat_themselves_bit_for_bit(unbroken, tmp_path):
    run_ranks(2, tmp_path, *RICH)
    assert_same_run(unbroken, tmp_path)


def test_the_evaluation_is_equal_to_the_last_bit_however_many_share_it(tmp_path):
    words = [*UNEVEN, "train.epochs=1", "data.batch_size=6", "checkpoint.monitor=val_auc"]
    trap = ("before validation", 0, signal.SIGTERM)
    words += ["loss.class_weights=[1, 2, 0.5]", "model.name=plain:Noisy", "model.args={}"]
    put_model(tmp_path / "1")
    assert run(tmp_path / "1", *words, trap=trap)[0] == 143
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


def test_a_model_that_computes_with_what_it_has_seen_goes_on_bit_for_bit(tmp_path):
    words = [*UNEVEN, "model.name=plain:Centred", "model.args={}"]
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    put_model(whole), put_model(broken)
    run_ranks(2, whole, *words)
    ranks = Ranks(2, broken, *words, traps={1: ("training", 3, signal.SIGKILL)})
    ranks.wait()
    run_ranks(2, broken, "--resume")
    assert_same_run(whole, broken)


PHASES = {
    "training": (1, "training", 3),
    "validation": (1, "validation", 17),
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
    assert "another process of this run has ended" in ranks.output()
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


def test_a_signal_to_a_process_of_a_finished_run_changes_nothing(tmp_path):
    ranks = Ranks(2, tmp_path, *RICH, "train.epochs=1", traps={1: ("leaving", 0, signal.SIGTERM)})
    assert ranks.wait() == [0, 0], ranks.output()
    assert "stopped by" not in ranks.output()


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
    assert not first.keys() & rest.keys()
    assert len(first) == 4  # the signal came after the third, the fourth was agreed on by then
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


def test_frozen_layers_stay_frozen_and_are_freed(tmp_path):
    words = [*PLAIN, "optim.freeze=layers.0", "optim.freeze_epochs=1"]
    for size in (1, 2):
        put_model(tmp_path / str(size))
        run_ranks(size, tmp_path / str(size), *words)
    alone, together = (
        load_checkpoint(tmp_path / size / "checkpoints/last.pth")["model_state_dict"]
        for size in ("1", "2")
    )
    for name, weights in alone.items():
        assert torch.allclose(weights, together[name], rtol=1e-4, atol=1e-6), name


def test_where_one_process_cannot_read_its_images_all_save_and_stop(unbroken_own, tmp_path):
    put_model(tmp_path)
    (tmp_path / "unreadable").touch()
    ranks = Ranks(2, tmp_path, *OWN)
    assert ranks.wait() == [1, 1], ranks.output()
    assert (
        "error: rank 1: fails_at_40:load train[40]: OSError: gone (fails_at_40.py:"
        in ranks.output()
    )
    assert "error: rank 1 cannot load its images" in ranks.output()
    (tmp_path / "unreadable").unlink()
    run_ranks(2, tmp_path, "--resume")
    assert_same_run(unbroken_own, tmp_path)


OWN = [*RICH, "data.name=fails_at_40:load", "data.args={}"]
OWN += ["loss.class_weights=null", "loss.name=plain:Remembering"]
OWN_DATA = """
import os
import numpy

class Images:
    def __init__(self, number):
        self.pixels = numpy.random.default_rng(0).integers(0, 255, (number, 8, 8), "uint8")
        self.targets = [i % 3 for i in range(number)]

    def __len__(self):
        return len(self.targets)

    def __getitem__(self, index):
        training = os.path.exists("logs/train.log") and index == 40 and len(self) == 110
        if training and os.path.exists("unreadable") and os.environ["RANK"] == "1":
            raise OSError("gone")
        return self.pixels[index], self.targets[index]

def load(root):
    return {"train": Images(110), "test": Images(30), "classes": ["a", "b", "c"]}
"""


@pytest.fixture(scope="module")
def unbroken_own(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("unbroken_own")
    put_model(folder)
    run_ranks(2, folder, *OWN)
    return folder


@pytest.mark.parametrize(
    "words, message",
    [
        (["data.batch_size=3"], "data.batch_size: expected at least 2 images for each of 2 proc"),
        (["optim.lrr=1"], "optim.lrr: no such key — did you mean 'optim.lr'?"),
        (["train.sync_batchnorm=true"], "train.sync_batchnorm: torch's SyncBatchNorm needs CUDA"),
        (["optim.freeze=nothing", "optim.freeze_epochs=1"], "optim.freeze: no parameter's name"),
        (["data.name=folder", "data.root=nowhere"], "nowhere"),
        (["--resume", "nowhere.pth"], "nowhere.pth: "),
        (["--find-lr"], "error: --find-lr is the work of one process, and torchrun has started 2"),
    ],
)
def test_what_cannot_be_done_is_refused_by_all_and_told_by_one(tmp_path, words, message):
    ranks = Ranks(2, tmp_path, *(UNEVEN if "--resume" not in words else []), *words)
    assert ranks.wait() == [2, 2], ranks.output()
    assert ranks.output().count(message) == 1
    assert "Traceback" not in ranks.output()


# -- the launcher itself ------------------------------------------------------------------------

LONG = [*UNEVEN, "train.epochs=24", "log.tensorboard=false", "checkpoint.every_steps=2"]


# Launchers that share one store of addresses count restarts each for itself; see the README.
SEVERAL_NODES = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}


class Torchrun:
    """torchrun as a user types it."""

    def __init__(self, folder: Path, options: list[str], *words: str, output: str = "output.txt"):
        self.output = folder / output
        with open(self.output, "a") as file:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "torch.distributed.run",
                    *options,
                    ROOT / "train.py",
                    *words,
                ],
                cwd=folder,
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=os.environ | SEVERAL_NODES,
            )

    def pid_of(self, rank: int) -> int | None:
        """The living process of that rank."""
        for folder in Path("/proc").glob("[0-9]*"):
            with contextlib.suppress(OSError, IndexError):
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                words = (folder / "environ").read_text().split("\0")
                if int(parent) == self.process.pid and f"RANK={rank}" in words:
                    return int(folder.name)
        return None

    def kill_rank(self, rank: int) -> None:
        pid = self.pid_of(rank)
        assert pid is not None, self.output.read_text()
        os.kill(pid, signal.SIGKILL)

    def wait(self) -> int:
        try:
            return self.process.wait(90)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


def wait_for_epoch(folder: Path, epoch: int) -> None:
    """Until the run has come that far."""
    path, deadline = folder / "logs/history.csv", time.monotonic() + 100
    while not path.exists() or path.read_text().count("\n") <= epoch:
        assert time.monotonic() < deadline, "".join(
            file.read_text() for file in folder.glob("output*")
        )
        time.sleep(0.02)


@pytest.mark.soak  # once also in .ci/run
@pytest.mark.parametrize("kills", [1, 3], ids=["once", "three times"])
def test_torchrun_goes_on_by_itself_when_a_process_is_killed(tmp_path, kills):
    words = [*LONG, f"train.epochs={6 + 6 * kills}"]
    run_ranks(2, tmp_path / "unbroken", *words)
    broken = tmp_path / "broken"
    broken.mkdir()
    options = ["--nproc-per-node=2", "--max-restarts=3"]
    launcher = Torchrun(broken, options, *words, "--resume")
    for number in range(kills):
        wait_for_epoch(broken, 3 + 6 * number)
        launcher.kill_rank(1)
    assert launcher.wait() == 0, launcher.output.read_text()
    assert (broken / "logs/train.log").read_text().count("==== resumed from") == kills
    assert_same_run(tmp_path / "unbroken", broken)


@pytest.mark.soak
def test_torchrun_told_to_stop_has_all_save(tmp_path):
    run_ranks(2, tmp_path / "unbroken", *LONG)
    broken = tmp_path / "broken"
    broken.mkdir()
    for epoch in (2, 5, 8, 11, 14, 17):
        launcher = Torchrun(
            broken, ["--nproc-per-node=2"], *LONG, "checkpoint.every_steps=null", "--resume"
        )
        wait_for_epoch(broken, epoch)
        os.kill(launcher.process.pid, signal.SIGTERM)
        launcher.wait()
        assert "stopped by SIGTERM" in (broken / "logs/train.log").read_text().splitlines()[-1]
    launcher = Torchrun(broken, ["--nproc-per-node=2"], *LONG, "--resume")
    assert launcher.wait() == 0
    assert_same_run(tmp_path / "unbroken", broken)


@pytest.mark.soak
def test_torchrun_with_nohup_and_its_option_outlives_the_terminal(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does; processes inherit it
    try:
        options = ["--signals-to-handle=SIGINT,SIGTERM", "--nproc-per-node=2"]
        launcher = Torchrun(tmp_path, options, *LONG)
    finally:
        signal.signal(signal.SIGHUP, before)
    wait_for_epoch(tmp_path, 3)
    os.killpg(launcher.process.pid, signal.SIGHUP)
    wait_for_epoch(tmp_path, 7)
    os.kill(launcher.process.pid, signal.SIGTERM)
    launcher.wait()
    assert "stopped by SIGTERM" in (tmp_path / "logs/train.log").read_text().splitlines()[-1]


@pytest.mark.soak
def test_two_nodes_go_on_when_one_launcher_is_lost_and_started_again(tmp_path):
    run_ranks(2, tmp_path / "unbroken", *LONG)
    broken = tmp_path / "broken"
    broken.mkdir()
    port = free_port()
    endpoint = f"--rdzv-endpoint=localhost:{port}"
    options = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=two", endpoint]
    options += ["--max-restarts=3", "--local-addr=127.0.0.1"]

    def launch(number: int) -> Torchrun:
        return Torchrun(broken, options, *LONG, "--resume", output=f"output_{number}.txt")

    first = launch(1)
    wait_for_listener(port)  # the launcher that comes first keeps what all know, and stays
    second = launch(2)
    wait_for_epoch(broken, 8)
    os.kill(second.process.pid, signal.SIGKILL)
    second.process.wait()
    again = launch(3)
    assert (first.wait(), again.wait()) == (0, 0), (
        first.output.read_text() + again.output.read_text()
    )
    assert "==== resumed from" in (broken / "logs/train.log").read_text()
    assert_same_run(tmp_path / "unbroken", broken)


PHOTOGRAPHS = [
    *RICH,
    *("data.name=folder", "data.root=../photos", "data.args={}", "data.image_size=24"),
    "loss.class_weights=balanced",
    "data.augment=[resized_crop, flip, vflip, rotate, color, crop, erase]",
]


def test_two_processes_on_photographs_go_on_bit_for_bit_without_the_cache(tmp_path):
    write_photographs(tmp_path / "photos", 28)
    whole, broken, other = (tmp_path / name for name in ("whole", "broken", "other"))
    run_ranks(2, whole, *PHOTOGRAPHS)
    Ranks(2, broken, *PHOTOGRAPHS, traps={1: ("training", 3, signal.SIGKILL)}).wait()
    shutil.rmtree(cache_folder())
    run_ranks(2, broken, "--resume")
    assert_same_run(whole, broken)
    words = [*PHOTOGRAPHS, "data.in_memory=false", "data.num_workers=1", "data.cache_gb=0"]
    shutil.rmtree(cache_folder())
    run_ranks(2, other, *words)
    assert_same_figures(whole, other)


KINDS = {
    "rich": RICH,
    "photographs": PHOTOGRAPHS,
    "photographs, image by image": [
        *PHOTOGRAPHS,
        *("data.in_memory=false", "data.num_workers=2", "data.cache_gb=0"),
    ],
    "two workers": [*RICH, "data.in_memory=false", "data.num_workers=2"],
    "fp16": [*UNEVEN, "train.precision=fp16", "train.epochs=3", "schedule.name=plateau"],
}


@pytest.mark.soak
@pytest.mark.parametrize("words", KINDS.values(), ids=KINDS)
def test_a_soak_of_kills(tmp_path, words):
    write_photographs(tmp_path / "photos", 28)
    run_ranks(2, tmp_path / "unbroken", *words)
    draw = random.Random(len(words))
    kills, runs, seconds = 0, 0, 0.0
    while kills < 20:
        folder, status = tmp_path / str(runs), None
        while status != [0, 0]:
            began = time.monotonic()
            ranks = Ranks(2, folder, *words, "--resume")
            whom = draw.choice(([0], [1], [0, 1]))
            number = draw.choice((signal.SIGKILL, signal.SIGTERM))
            ranks.processes[0].process.join(draw.uniform(0, max(seconds, 2.0)))
            living = [ranks.processes[rank] for rank in whom]
            living = [process for process in living if process.process.exitcode is None]
            for process in living:
                process.kill(number)
            status = ranks.wait_as_launcher()
            kills += bool(living) and status != [0, 0]
            if status == [0, 0]:
                seconds = max(seconds, time.monotonic() - began)
            assert set(status) <= {0, 1, -6, -number, 128 + number, -15, 143}, ranks.output()
        assert_same_run(tmp_path / "unbroken", folder)
        runs += 1
    print(f"{kills} kills in {runs} runs")


@pytest.mark.soak
def test_with_changing_numbers_of_processes_a_run_is_as_accurate_as_another_seed(tmp_path):
    digits = ["--config", str(ROOT / "configs/config.yaml"), "log.report=false"]

    def accuracy(folder: Path) -> float:
        return load_checkpoint(folder / "checkpoints/last.pth")["test"]["test_acc"]

    seeds = []
    for seed in range(5):
        run_ranks(1, tmp_path / str(seed), *digits, f"seed={seed}")
        seeds.append(accuracy(tmp_path / str(seed)))
    images = {}
    for size, passes in ((2, 60), (1, 40), (2, 30), (1, None)):  # steps, each from where it stopped
        traps = {} if passes is None else {size - 1: ("training", passes, signal.SIGKILL)}
        words = [*digits, "checkpoint.every_steps=7", "--resume"]
        Ranks(size, tmp_path / "changing", *words, traps=traps).wait()
        images |= trained_on(tmp_path / "changing", size)
        for path in (tmp_path / "changing").glob("trained_*"):
            path.unlink()
    whole = trained_on(tmp_path / "0", 1)
    assert {place: batch["images"] for place, batch in images.items()} == {
        place: batch["images"] for place, batch in whole.items()
    }
    print(f"seeds {seeds}, changing {accuracy(tmp_path / 'changing')}")
    spread = max(seeds) - min(seeds)
    assert min(seeds) - spread <= accuracy(tmp_path / "changing") <= max(seeds) + spread
