"""Runs of train.py as processes that can be killed whole, without paying for `import torch` each time.

A fork server imports everything once; each run is a fork of it, in a session (process group) of its
own, workers included.
"""

import contextlib
import functools
import json
import multiprocessing
import multiprocessing.connection
import multiprocessing.forkserver
import os
import random
import resource
import signal
import socket
import sys
import time
from pathlib import Path

import torch

import train
from cnn.drill.trace import digest
from cnn.records import records
from cnn.training import distributed, engine, saver
from cnn.utils import checkpoint, files, seeding, signals

os.environ.setdefault(
    "TORCH_CPP_LOG_LEVEL", "ERROR"
)  # as cli.run_command does, before torch is imported
CONTEXT = multiprocessing.get_context("forkserver")


@functools.cache
def start_server(*more: str) -> None:
    """Starts the server where it finds what it is to import: it looks nowhere else, and says nothing.

    Args:
        more: modules that it imports besides, where it does not run yet.
    """
    ours = ["cnn.training.setup", "cnn.records.records", "train", "processes", "sweeping"]
    CONTEXT.set_forkserver_preload(["pytest", "torchvision.transforms.v2", *ours, *more])
    before = os.environ.get("PYTHONPATH")
    root = Path(train.__file__).parent
    os.environ["PYTHONPATH"] = os.pathsep.join(map(str, (root, root / "tests")))
    multiprocessing.forkserver.ensure_running()
    os.environ.pop("PYTHONPATH")
    if before is not None:
        os.environ["PYTHONPATH"] = before


class Process:
    """A run of train.py in a folder, with the cache of the test that starts it.

    Args:
        trap: a place in the run (TRAPS), how often it is passed before, and the signal that the
            process group gets there; or several, of which the first that is reached stops it.
        room: bytes that a file may have, as on a disk that is full then.
        open_files: that it may have at once, of which three are its streams.
        rank: of several processes that train together, what torchrun tells this one in the
            environment; it then also records what it trains on in `trained_RANK.jsonl`.
    """

    def __init__(
        self,
        folder: Path,
        *words: str,
        trap: "Trap | list[Trap] | None" = None,
        room: int | None = None,
        open_files: int | None = None,
        output: str = "output.txt",
        rank: dict[str, str] | None = None,
    ):
        start_server()
        folder.mkdir(parents=True, exist_ok=True)
        self.output = folder / output
        self.output.unlink(missing_ok=True)
        cache = os.environ.get("XDG_CACHE_HOME", str(folder.resolve() / "cache"))
        environment = {"XDG_CACHE_HOME": cache} | (rank or {})
        self.process = CONTEXT.Process(
            target=_run,
            args=(folder, words, trap, room, open_files, self.output, environment),
        )
        self.process.start()

    def kill_after(self, seconds: float, number: int) -> None:
        """Sends a signal so long after the run has begun, if it lasts; before, it would be Python's."""
        while not self.output.exists() and self.process.exitcode is None:
            time.sleep(0.005)
        self.process.join(seconds)
        if self.process.exitcode is None:
            self.kill(number)

    def kill(self, number: int = signal.SIGKILL) -> None:
        """Sends a signal to the whole group."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:  # not yet a group; or gone, though it may not be known here yet
            if self.process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(self.process.pid, number)

    def wait(self) -> int:
        """The exit status; -N for signal N."""
        self.process.join(100)
        assert self.process.exitcode is not None, f"hangs:\n{self.output.read_text()}"
        return self.process.exitcode


def run(
    folder: Path,
    *words: str,
    trap: tuple[str, int, int] | None = None,
    room: int | None = None,
    open_files: int | None = None,
) -> tuple[int, str]:
    """A run to its end: exit status and all it said."""
    process = Process(folder, *words, trap=trap, room=room, open_files=open_files)
    return process.wait(), process.output.read_text()


def run_through_kills(
    folder: Path, *words: str, seed: int, longest: float, signals: list[int]
) -> tuple[int, int]:
    """Starts, kills and resumes a run until it is done; the times are drawn from the seed.

    Returns:
        How often a living process was killed, and the exit status at the end.
    """
    draw = random.Random(seed)
    kills = 0
    while True:
        process = Process(folder, *words, "--resume")
        process.process.join(draw.uniform(0, longest))
        number = draw.choice(signals)
        if process.process.exitcode is None:
            process.kill(number)
        status = process.wait()
        if status == 0:  # it was done, or the signal came too late
            return kills, status
        expected = {-number, 128 + number}
        assert status in expected, f"{status} after signal {number}:\n{process.output.read_text()}"
        kills += 1


def _run(
    folder: Path,
    words: tuple[str, ...],
    trap: "Trap | list[Trap] | None",
    room: int | None,
    open_files: int | None,
    output: Path,
    environment: dict[str, str],
):
    os.setsid()
    # A drill that has begun in this process before has started the server deaf to signals.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, signals.NUMBERS)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    if room is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))
    multiprocessing.set_start_method("fork", force=True)  # for the workers, as without this server
    os.chdir(folder)
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    os.close(descriptor)
    if open_files is not None:  # of a process of its own: without those of the server
        open_files += len(os.listdir("/proc/self/fd")) - 1 - 3
        resource.setrlimit(resource.RLIMIT_NOFILE, (open_files, open_files))
    torch.set_num_threads(1)
    sys.argv = ["train.py", *words]
    for each in trap if isinstance(trap, list) else [trap] if trap else []:
        set_trap(*each)
    os.environ.update(environment)
    if "RANK" in environment:
        record_training(folder / f"trained_{environment['RANK']}.jsonl")
    status = train.main(list(words))
    sys.stderr.flush()
    os._exit(status)


# -- traps: a signal at an exact place --------------------------------------------------------

Trap = tuple[str, int, int]  # the place, how often it is passed before, the signal

TRAPS = {
    "training": (saver.Saver, "between_steps"),
    "before validation": (engine, "evaluate"),
    "validation": (seeding, "seed_step"),  # called for every batch, also of training
    "after the epoch": (saver.Saver, "end_epoch"),
    "copying": (checkpoint, "clone_tree"),
    "writing": (torch, "save"),
    "before best.pth is renamed": (files.os, "replace"),
    "before last.pth is renamed": (files.os, "replace"),
    "before the test": (saver.Saver, "load_best"),
    "an evaluation": (engine, "compute_loss"),  # called for every batch of validation and test
    "before a file is renamed": (files.os, "replace"),  # whichever it is
    "after the test": (records.Records, "finish"),
    "leaving": (distributed.Group, "disconnect"),
}


def set_trap(place: str, passes: int, number: int) -> None:
    """Has the group killed when `place` is reached after so many passes."""
    owner, name = TRAPS[place]
    original = getattr(owner, name)
    file = place.split()[1] if place.endswith(".pth is renamed") else None
    left = [passes]

    def is_there(args: tuple) -> bool:
        if place == "an evaluation":
            return not torch.is_grad_enabled()
        return file is None or Path(args[1]).name == file

    def trapped(*args, **keywords):
        if is_there(args):
            if left[0] == 0:
                os.killpg(0, number)
                time.sleep(0.02)  # let a handler in the main thread run if this is another
            left[0] -= 1
        return original(*args, **keywords)

    setattr(owner, name, trapped)


# -- several processes that train together ------------------------------------------------------


class Ranks:
    """A run in several processes, each started as torchrun would, without paying for its start.

    Args:
        traps: by rank, as of a `Process`.
    """

    def __init__(
        self,
        size: int,
        folder: Path,
        *words: str,
        traps: "dict[int, Trap | list[Trap]] | None" = None,
    ):
        common = {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(size),
            "LOCAL_WORLD_SIZE": str(size),
            "GROUP_RANK": "0",
        }
        self.processes = [
            Process(
                folder,
                *words,
                trap=(traps or {}).get(rank),
                output=f"output_{rank}.txt",
                rank=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(size)
        ]

    def wait(self) -> list[int]:
        """The exit statuses; what one of them leaves alone is no use and ends by itself."""
        return [process.wait() for process in self.processes]

    def wait_as_launcher(self) -> list[int]:
        """The same, where as soon as one has failed the others are told to stop, as torchrun does."""
        running = {process.process.sentinel: process for process in self.processes}
        while running:
            for sentinel in multiprocessing.connection.wait(list(running), 100):
                if running.pop(sentinel).wait() != 0:
                    for process in running.values():
                        process.kill(signal.SIGTERM)
                    return self.wait()
        return [0] * len(self.processes)

    def output(self) -> str:
        return "\n".join(process.output.read_text() for process in self.processes)


class Alone(Ranks):
    """A run in one process, started without torchrun, in the place of several."""

    def __init__(
        self, folder: Path, *words: str, traps: "dict[int, Trap | list[Trap]] | None" = None
    ):
        self.processes = [Process(folder, *words, trap=(traps or {}).get(0))]


def run_ranks(size: int, folder: Path, *words: str) -> str:
    """A run in several processes to its end; all they said."""
    ranks = Ranks(size, folder, *words)
    statuses = ranks.wait()
    assert statuses == [0] * size, f"{statuses}\n{ranks.output()}"
    return ranks.output()


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def wait_for_listener(port: int) -> None:
    """Waits until somebody on this machine accepts connections."""
    end = time.monotonic() + 60
    while time.monotonic() < end:
        with socket.socket() as one:
            if one.connect_ex(("127.0.0.1", port)) == 0:
                return
        time.sleep(0.05)
    raise TimeoutError(f"nobody listens on port {port}")


def record_training(path: Path) -> None:
    """Has every batch that is trained on recorded: its images that count, and its loss."""
    original = engine.train_one_epoch

    def recorded(run, batches):
        state, seen = run.state, []
        before = state.running_metrics.loss.item()

        def watched():
            for number, (images, labels, count) in enumerate(batches, start=state.batch):
                own = zip(images[:count], labels[:count].tolist())
                hashes = [f"{digest(image)} {label}" for image, label in own]
                seen.append({"epoch": state.epoch + 1, "batch": number, "images": hashes})
                yield images, labels, count

        for step in original(run, watched()):
            seen[-1] |= {"loss": state.running_metrics.loss.item() - before}
            before = state.running_metrics.loss.item()
            with open(path, "a") as file:
                file.writelines(json.dumps(batch) + "\n" for batch in seen)
            seen.clear()
            yield step

    engine.train_one_epoch = recorded


def trained_on(folder: Path, size: int) -> dict[tuple[int, int], dict]:
    """By epoch and batch: the images of all ranks in their order, and the sum of the step's losses."""
    batches: dict[tuple[int, int], dict] = {}
    for rank in range(size):
        with open(folder / f"trained_{rank}.jsonl") as file:
            for line in map(json.loads, file):
                batch = batches.setdefault((line["epoch"], line["batch"]), {"images": []})
                batch["images"] += line["images"]
                batch["loss"] = line.get("loss")
    return batches
