"""Whatever is set, a run stopped five times leaves what the unbroken one leaves, in every record.

pytest -m soak tests/test_training_matrix.py                        60 rows of settings drawn at random
SOAK_ROWS=1000 SOAK_SEED=7 pytest -m soak tests/test_training_matrix.py
SOAK_ROW=12 pytest -s -m soak tests/test_training_matrix.py         one of them again, with what it tells
"""

import csv
import os
import random
import re
import shlex
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from conftest import TINY
from matrix import Row, draw_row
from processes import Alone, Ranks, Trap, run, start_server
from test_records_tensorboard import read

from cnn.config import load_config
from cnn.config.settings import AUGMENTATIONS, MONITORED, OPTIMIZERS, SCHEDULES
from cnn.drill.differences import differences
from cnn.training.state import TIME_COLUMNS
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.run_folder import RunFolder

SEED = int(os.environ.get("SOAK_SEED", "15"))
ROWS = range(int(os.environ.get("SOAK_ROWS", "60")))
if "SOAK_ROW" in os.environ:
    ROWS = [int(os.environ["SOAK_ROW"])]

STOPS = 5
TRACEBACK = "Traceback (most recent call last)"
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
# Places to be stopped at, and how many passes at most come before. Only the first of several
# processes saves.
PLACES = {
    "training": 12,
    "before validation": 2,
    "an evaluation": 8,
    "after the epoch": 2,
    "copying": 300,
    "writing": 3,
    "before best.pth is renamed": 2,
    "before last.pth is renamed": 3,
    "before a file is renamed": 20,
}
OF_FIRST = ("copying", "writing")


def name_of(number: int) -> str:
    return "-".join([str(number), *draw_row(SEED, number).marks]).replace(" ", "-")


def test_rows_are_valid_and_of_everything_there_is():
    rows = [draw_row(SEED, number) for number in range(60)]
    for row in rows:
        load_config(Path(TINY[1]), row.words[2:])
    said = set(re.findall(r"\w+", " ".join(word for row in rows for word in row.words)))
    assert said >= {*OPTIMIZERS, *SCHEDULES, *AUGMENTATIONS, *MONITORED}
    assert draw_row(SEED, 9) == rows[9] != draw_row(SEED + 1, 9)


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> None:
    """Has imported what every process would take its time for, before the first one is timed."""
    start_server("cnn.records.report", "cnn.records.tensorboard")
    assert run(tmp_path_factory.mktemp("first"), "--print-config")[0] == 0


@pytest.mark.soak
@pytest.mark.usefixtures("server")
@pytest.mark.parametrize("number", ROWS, ids=name_of)
def test_a_run_stopped_five_times_leaves_what_an_unbroken_one_leaves(tmp_path, number):
    row = draw_row(SEED, number)
    print(f"\nSOAK_SEED={SEED} SOAK_ROW={number}", *(f"[{mark}]" for mark in row.marks))
    print(f"  python train.py {shlex.join(row.words)}")
    unbroken = tmp_path / "unbroken"
    row.prepare(unbroken)
    began = time.time()
    ranks = start(row, unbroken, *row.words)
    assert ranks.wait() == [0] * row.size, ranks.output()
    took = time.time() - began
    ready = RunFolder(None, unbroken).logs.model.stat().st_mtime - began  # its last word before
    stops, found = 0, []
    draw = row.draw("stops")
    while stops < STOPS:  # where one came too late, there is another run with shorter times
        folder = tmp_path / f"stopped after {stops}"
        row.prepare(folder)
        times = (ready, took / (1 + stops))
        stops += run_through_stops(row, folder, draw, STOPS - stops, times, found)
        found += all_differences(unbroken, folder)
    said = sum(TRACEBACK in what for what in found)
    seconds = f"{took:.1f} s, with {stops} stops {time.time() - began:.1f} s"
    print(f"  {len(found) - said} differences, {said} tracebacks; {seconds}")
    assert not found, "\n".join([f"{number} {row.marks}:", *found[:20]])
    assert stops >= STOPS


# -- stopped and resumed -------------------------------------------------------------------------


def start(row: Row, folder: Path, *words: str, traps: dict[int, list[Trap]] | None = None) -> Ranks:
    if row.size == 1:
        return Alone(folder, *words, traps=traps)
    return Ranks(row.size, folder, *words, traps=traps)


@dataclass(frozen=True)
class Stop:
    """A signal to one of a run's processes: after so many seconds, or where the first trap is."""

    number: int
    rank: int
    traps: list[Trap]
    seconds: float | None = None

    def __str__(self) -> str:
        place, passes, _ = self.traps[0]
        when = f"at {place}, {passes}" if self.seconds is None else f"after {self.seconds:.2f} s"
        return f"{signal.Signals(self.number).name} to rank {self.rank} {when}"


def run_through_stops(
    row: Row,
    folder: Path,
    draw: random.Random,
    stops: int,
    times: tuple[float, float],
    found: list[str],
) -> int:
    """A run to its end, stopped so many times and resumed, each time with other loader processes.

    Args:
        times: seconds that an unbroken run takes until it trains, and in all.
        found: is told of tracebacks.

    Returns:
        How many stops there were; fewer where one came too late.
    """
    for stopped in range(stops):
        words, stop = resume_words(row, folder, draw), draw_stop(row, draw, stopped, stops, times)
        ranks = start(row, folder, *words, traps={stop.rank: stop.traps})
        if stop.seconds is not None:
            ranks.processes[stop.rank].kill_after(stop.seconds, stop.number)
        statuses = ranks.wait_as_launcher()
        print(f"  {shlex.join(words[-2:])}: {stop}: {statuses}")
        if statuses == [0] * row.size:
            return stopped
        check_stopped(ranks, statuses, stop.number)
        found += tracebacks(ranks, stop)
    ranks = start(row, folder, *resume_words(row, folder, draw))
    assert ranks.wait() == [0] * row.size, ranks.output()
    return stops


def resume_words(row: Row, folder: Path, draw: random.Random) -> list[str]:
    """The words that go on with a run, or begin it where it has left nothing to go on from."""
    run, workers = RunFolder(None, folder), f"data.num_workers={draw.randint(0, 3)}"
    ways = [[*row.words, "--resume"], ["--resume"], ["--resume", "checkpoints/last.pth"]]
    way = draw.choice(ways[: 1 if not run.saved() else 2 if not run.last.exists() else 3])
    return [*way, workers]


def draw_stop(
    row: Row, draw: random.Random, stopped: int, stops: int, times: tuple[float, float]
) -> Stop:
    """Where a run is stopped; at the latest in its test, so that it does not end before its time."""
    number, rank = draw.choice(SIGNALS), draw.randrange(row.size)
    end = ("before the test", 0, number)
    if stopped + 1 == stops and draw.random() < 0.3:
        return Stop(signal.SIGKILL, 0, [("after the test", 0, signal.SIGKILL)])
    if draw.random() < 0.4:
        return Stop(number, rank, [end], draw.uniform(times[0] / 2, times[1]))
    place = draw.choice(list(PLACES))
    rank = 0 if place.startswith(OF_FIRST) or place.endswith("renamed") else rank
    return Stop(number, rank, [(place, draw.randrange(PLACES[place]), number), end])


def check_stopped(ranks: Ranks, statuses: list[int], number: int) -> None:
    """Holds that a run ended by the signal, its other processes as torchrun has them end."""
    own = {-number, 128 + number}
    elsewhere = {0, 1, -6, -15, 143} if len(statuses) > 1 else set()
    fits = set(statuses) & own and set(statuses) <= own | elsewhere
    assert fits, f"{statuses}\n{ranks.output()}"


def tracebacks(ranks: Ranks, stop: Stop) -> Iterator[str]:
    """Of every process that has said more than its message, all of it."""
    for rank, process in enumerate(ranks.processes):
        output = process.output.read_text()
        if TRACEBACK in output:
            yield f"{stop}: rank {rank}: {output}"


# -- every record --------------------------------------------------------------------------------

# What may be another: how many loader processes the last of a run's processes had, and when it was.
FREE_LINES = re.compile(r"^ *-? *(num_workers|timestamp|updated_at): .*", re.MULTILINE)


def all_differences(first: Path, second: Path) -> list[str]:
    """Where the records of two runs of one configuration part."""
    return [*of_names(first, second), *of_checkpoints(first, second), *of_files(first, second)] + [
        *of_history(first, second),
        *of_tensorboard(first, second),
    ]


def names_of(folder: Path) -> set[str]:
    """The files of a run, of TensorBoard's their folders; without what was moved aside."""
    paths = [path.relative_to(folder) for path in folder.rglob("*") if path.is_file()]
    paths = [path for path in paths if path.parts[0] in ("logs", "checkpoints", "configs")]
    paths = [path for path in paths if "archive" not in path.parts]
    return {str(path.parent if "tfevents" in path.name else path) for path in paths}


def of_names(first: Path, second: Path) -> Iterator[str]:
    for name in sorted(names_of(first) ^ names_of(second)):
        yield f"{name}: only in one of the two"


def of_checkpoints(first: Path, second: Path) -> Iterator[str]:
    for path in RunFolder(None, first).saved():
        other = second / path.relative_to(first)
        contents = [load_checkpoint(file) for file in (path, other) if file.exists()]
        for content in contents:
            content["config"]["data"]["num_workers"] = None
        yield from (f"{path.name}: {found}" for found in differences(contents[0], contents[-1]))


def of_files(first: Path, second: Path) -> Iterator[str]:
    logs = RunFolder(None, first).logs
    exact = [logs.result, logs.val_predictions, logs.confusion_matrix, logs.config]
    for path in [*exact, *RunFolder(None, first).best_hparams.glob("*.yaml")]:
        name = path.relative_to(first)
        one, other = (Path(f, name).read_bytes() if path.exists() else b"" for f in (first, second))
        if path.suffix == ".yaml":
            one, other = (FREE_LINES.sub("", text.decode()).split("\n") for text in (one, other))
            yield from (f"{name}: {pair}" for pair in zip(one, other) if len(set(pair)) > 1)
        elif one != other:
            yield f"{name}: {len(one)} and {len(other)} bytes"


def of_history(first: Path, second: Path) -> Iterator[str]:
    tables = []
    for folder in (first, second):
        with open(RunFolder(None, folder).logs.history, newline="", encoding="utf-8") as file:
            head, *rows = csv.reader(file)
        assert head[-2:] == list(TIME_COLUMNS)
        tables.append([row[:-2] for row in (head, *rows)])
    if tables[0] != tables[1]:
        yield f"history.csv: {tables[0]}, {tables[1]}"


def of_tensorboard(first: Path, second: Path) -> Iterator[str]:
    if not RunFolder(None, first).logs.tensorboard.exists():
        return
    for kind in ("scalars", "images"):
        one, other = (read(folder, kind) for folder in (first, second))
        for tag in sorted(one.keys() | other.keys()):
            if repr(one.get(tag)) != repr(other.get(tag)):
                yield f"tensorboard {tag}: {one.get(tag)}, {other.get(tag)}"
