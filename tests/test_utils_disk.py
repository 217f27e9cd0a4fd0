"""What the disk does to a run: power cuts, kills, no room, no right to write, a folder gone."""

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
from archives import FIRST_FORMAT, content
from conftest import ROOT, TINY, assert_same_run
from processes import Process, run
from torn_disk import PowerCut, TornDisk

from cnn.drill.differences import differences
from cnn.errors import Refused
from cnn.records import records
from cnn.training.resume import latest_checkpoint
from cnn.training.saver import Saver
from cnn.utils import checkpoint, files
from cnn.utils.checkpoint import load_checkpoint, save_checkpoint
from cnn.utils.files import TEMPORARY, remove_leftovers, temporary_name, write_record
from cnn.utils.run_folder import RunFolder

NAMES = ("last.pth", "best.pth", "epoch_002.pth")


def older() -> dict:
    tree = content()
    tree["epoch"], tree["step"] = 1, 4
    tree["scheduler_state_dict"]["by_step"]["last_epoch"] = 4
    del tree["history"][1:]
    tree["best"] |= {"epoch": 1, "value": tree["history"][0][tree["best"]["metric"]]}
    return tree


# -- a power cut after each operation ---------------------------------------------------------


def save_all(folder: Path) -> None:
    last, best, epoch = (folder / name for name in NAMES)
    save_checkpoint(content(), last, (best, epoch))
    write_record(folder / "history.csv", "epoch\n1\n2\n")


OLDER = Path("older.pth")


def cut_off(number: int | None) -> TornDisk:
    """A save of last, best, an epoch's file and history.csv; the power goes after so many steps."""
    folder = Path("run/checkpoints")
    shutil.rmtree("run", ignore_errors=True)
    folder.mkdir(parents=True)
    if not OLDER.exists():
        save_checkpoint(older(), OLDER)
    for name in ("last.pth", "best.pth"):
        shutil.copy(OLDER, folder / name)
    (folder / "history.csv").write_text("epoch\n1\n")
    disk = TornDisk(folder, number)
    with pytest.MonkeyPatch.context() as patch:
        disk.install(patch)
        try:
            save_all(folder)
        except (PowerCut, RuntimeError, OSError):  # torch says it its own way
            assert disk.done == number
    return disk


def lay_out(state: dict[str, bytes], folder: Path) -> RunFolder:
    shutil.rmtree(folder, ignore_errors=True)
    run = RunFolder(None, folder)
    run.checkpoints.mkdir(parents=True)
    for name, data in state.items():
        (run.checkpoints / name).write_bytes(data)
    return run


def assert_goes_on(state: dict[str, bytes]) -> str:
    """The folder resumes from a whole file, and nothing in it is torn."""
    run = lay_out(state, Path("found"))
    remove_leftovers(run.checkpoints)
    assert not list(run.checkpoints.glob(".*"))
    _, found = latest_checkpoint(run)
    age = "new" if found["epoch"] == 2 else "old"
    assert not list(differences(found, content() if age == "new" else older()))
    epochs = {
        path.name: load_checkpoint(path)["epoch"] for path in run.checkpoints.glob("*.pth")
    }  # each of them whole
    assert epochs["best.pth"] >= epochs["last.pth"], "last.pth speaks of a best that is not there"
    assert (run.checkpoints / "history.csv").read_text() in ("epoch\n1\n", "epoch\n1\n2\n")
    return age


def test_after_a_power_cut_at_any_operation_the_run_goes_on():
    operations = cut_off(None).done
    ages, seen, count = [], {}, 0
    for number in range(1, operations + 1):
        found = set()
        for state in cut_off(number).states(limit=32):
            count += 1
            key = tuple((name, data) for name, data in sorted(state.items()) if name[0] != ".")
            if key not in seen:  # what differs in leftovers alone is the same once they are cleared
                seen[key] = assert_goes_on(state)
            found.add(seen[key])
        ages.append(found)
    print(f"{operations} crash points, {count} states of the disk, {len(seen)} without leftovers")
    assert operations > 50
    assert ages[0] == {"old"} and ages[-1] == {"new"}, "a finished save survives"


def test_the_torn_disk_notices_a_save_that_does_not_sync(monkeypatch):
    """The test above can fail: without fsync, or without a temporary file, it does."""
    monkeypatch.setattr(checkpoint, "write_atomically", write_in_place)
    with pytest.raises((AssertionError, Refused)):
        for number in range(1, cut_off(None).done + 1):
            for state in cut_off(number).states(limit=16):
                assert_goes_on(state)


def write_in_place(path: Path, write, also: tuple[Path, ...] = ()) -> None:
    for name in (*also, path):
        with getattr(files, "open", open)(name, "w+b") as file:
            write(file)


def test_leftovers_of_a_crash_are_cleared_at_the_next_start(train):
    assert train("train.epochs=1") == 0
    left = [temporary_name(Path(name)) for name in ("checkpoints/epoch_9.pth", "logs/report.html")]
    for path in left:
        path.write_bytes(b"half of it")
    assert train("--resume", "train.epochs=3") == 0
    assert not any(path.exists() for path in left)


# -- kill -9 while a large file is written ----------------------------------------------------


def kill_saves(megabytes: int, kills: int) -> int:
    """Kills a process that saves, at random times, until so many kills came within a save.

    Returns:
        How often the file was not whole after one.
    """
    draw, number, within, failed = random.Random(1), 0, 0, 0
    path = Path("checkpoints/last.pth")
    path.parent.mkdir()
    tree = content()
    tree["optimizer_state_dict"]["state"]["large"] = torch.zeros(megabytes * 250_000)
    for _ in range(2):  # the second is as fast as those to come
        began = time.monotonic()
        save_checkpoint(tree, path)
    seconds = time.monotonic() - began
    while within < kills:
        number += 1
        read, ready = os.pipe()
        child = os.fork()
        if child == 0:
            tree["step"] = tree["scheduler_state_dict"]["by_step"]["last_epoch"] = number
            os.write(ready, b"!")
            save_checkpoint(tree, path)
            os.kill(os.getpid(), signal.SIGSTOP)
        os.read(read, 1)
        time.sleep(draw.uniform(0, seconds))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(read), os.close(ready)
        within += bool(list(path.parent.glob(f".*{TEMPORARY}")))
        remove_leftovers(path.parent)
        try:
            load_checkpoint(path)
        except Refused as refusal:
            print(refusal)
            failed += 1
    print(f"{number} kills, {within} within a save of {megabytes} MB, {failed} failed resumes")
    return failed


def test_a_kill_within_a_save_leaves_the_file_of_before_whole():
    assert kill_saves(megabytes=20, kills=8) == 0


@pytest.mark.soak
def test_a_hundred_kills_within_saves_of_200_mb():
    assert kill_saves(megabytes=200, kills=100) == 0


# -- no room, no right, no folder -------------------------------------------------------------


def test_a_full_disk_costs_a_save_and_not_the_run(train):
    assert train("train.epochs=1") == 0
    before = Path("checkpoints/last.pth").read_bytes()
    status, output = run(Path.cwd(), "--resume", "train.epochs=4", room=10_000)
    print(output)
    assert status == 1 and "Traceback" not in output
    assert "epoch 4/4" in output, "training goes on to its end"
    assert output.count("could not save checkpoints/last.pth: File too large; it needs ") == 4
    assert " free. The file of before is kept, training goes on, the next save" in output
    assert (
        "Safe is checkpoints/last.pth, after epoch 1, step 4: --resume checkpoints/last.pth"
        in output
    )
    assert Path("checkpoints/last.pth").read_bytes() == before
    assert sorted(path.name for path in Path("checkpoints").iterdir()) == [
        *(".run.lock", "best.pth", "last.pth")
    ]
    assert train("train.epochs=4", "run=whole") == 0
    assert train("--resume", "train.epochs=4") == 0  # with room again: as if nothing had been
    shutil.copytree("checkpoints/whole", "a/checkpoints")
    shutil.copytree("logs/whole", "a/logs")
    assert_same_run("a", ".")


def test_a_full_file_system_costs_a_save_and_not_the_run():
    Path("small").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", "small"]
    if (
        shutil.which("mount") is None
        or subprocess.run(mount, capture_output=True, check=False).returncode
    ):
        pytest.skip("mounting is not allowed here")
    try:
        os.chdir("small")
        words = ["train.epochs=4", "model.args={width: 4, dropout: 0.3}"]
        Path("mine.py").write_text(
            "from pathlib import Path\n"
            "calls = []\n"
            "def fill(image):\n"
            "    calls.append(1)\n"
            "    if len(calls) == 100:\n"
            "        try:\n"
            "            with open('filler', 'wb', buffering=0) as file:\n"
            "                while file.write(bytes(4096)): pass\n"
            "        except OSError: pass\n"
            "    if len(calls) == 200: Path('filler').unlink()\n"
            "    return image\n"
        )
        words = [*words, "checkpoint.every_steps=1", "data.augment=[mine:fill]"]
        status, output = run(Path.cwd(), *TINY, *words)
        print(output)
        assert status == 0 and "Traceback" not in output
        assert "could not save checkpoints/last.pth: No space left on device; it needs" in output
        assert "checkpoints has 0 kB free" in output
        assert load_checkpoint(Path("checkpoints/last.pth"))["epoch"] == 4
    finally:
        os.chdir("..")
        subprocess.run(["umount", "small"], check=True)


def raising_failed(reason: int, fails: list[bool]):
    """write_atomically on a disk that says no while `fails` says so."""
    original = files.write_atomically

    def write(path: Path, write, also: tuple[Path, ...] = ()) -> None:
        if fails[0]:
            raise OSError(reason, os.strerror(reason), str(path))
        original(path, write, also)

    return write


@pytest.mark.parametrize("reason", ["EROFS", "EDQUOT", "EIO", "EACCES"])
def test_the_systems_own_reason_is_told_and_what_is_safe(train, capfd, monkeypatch, reason):
    import errno

    assert train("train.epochs=1") == 0
    fails = [True]
    monkeypatch.setattr(
        checkpoint, "write_atomically", raising_failed(number := getattr(errno, reason), fails)
    )
    assert train("--resume", "train.epochs=3") == 1
    said = capfd.readouterr().err
    assert said.count(f"could not save checkpoints/last.pth: {os.strerror(number)}; it needs") == 3
    assert "Safe is checkpoints/last.pth, after epoch 1, step 4" in said
    assert "Traceback" not in said


def test_the_best_epoch_is_written_later_where_it_could_not_be(train, monkeypatch):
    """The disk fails for the one save that was best; the next is not, and still it gets there."""

    words = ["train.epochs=5", "optim.lr=0.8", "seed=1"]
    assert train(*words) == 0
    shutil.copytree("checkpoints", "whole/checkpoints")
    shutil.copytree("logs", "whole/logs")
    best = load_checkpoint(Path("checkpoints/best.pth"))["epoch"]
    assert best < 5, "this test needs a best epoch before the last"
    fails = [False]
    monkeypatch.setattr(checkpoint, "write_atomically", raising_failed(5, fails))
    original = Saver.end_epoch

    def end_epoch(saver: Saver, improved: bool) -> None:
        saver.writer.wait()
        fails[0] = saver.state.epoch == best
        original(saver, improved)
        saver.writer.wait()

    monkeypatch.setattr(Saver, "end_epoch", end_epoch)
    assert train(*words) == 0
    assert_same_run("whole", ".")


def test_a_folder_that_vanishes_while_training_is_told_and_costs_no_epoch(
    train, capfd, monkeypatch
):

    original = Saver.end_epoch

    def end_epoch(saver: Saver, improved: bool) -> None:
        original(saver, improved)
        saver.writer.wait()
        if saver.state.epoch == 1:
            shutil.rmtree("checkpoints")

    monkeypatch.setattr(Saver, "end_epoch", end_epoch)
    assert train("train.epochs=3") == 1
    said = capfd.readouterr().err
    assert "epoch 3/3" in said and "Traceback" not in said
    assert said.count("could not save checkpoints/last.pth: No such file or directory") == 3
    assert "No file of this run can be read in checkpoints" in said


def test_a_stop_that_cannot_be_saved_is_a_failure(train, capfd, monkeypatch):
    from cnn.errors import Stopped

    assert train("train.epochs=1") == 0
    monkeypatch.setattr(checkpoint, "write_atomically", raising_failed(28, [True]))

    def stop(saver: Saver) -> None:
        raise Stopped(signal.SIGTERM)

    monkeypatch.setattr(Saver, "between_steps", stop)
    assert train("--resume", "train.epochs=3") == 1
    assert "Safe is checkpoints/last.pth, after epoch 1" in capfd.readouterr().err


@pytest.mark.parametrize("name", ["history.csv", "config.yaml", "model.txt", "train.log"])
def test_a_record_that_cannot_be_written_stops_nothing(train, capfd, name):
    assert train("train.epochs=1") == 0
    Path("logs", name).unlink()
    Path("logs", name).mkdir()  # a folder where the file should be
    assert train("--resume", "train.epochs=3") == 0
    said = capfd.readouterr().err
    assert f"logs/{name}: cannot be written: Is a directory; training goes on" in said
    assert "Traceback" not in said and load_checkpoint(Path("checkpoints/last.pth"))["epoch"] == 3


def test_an_old_record_that_cannot_be_removed_stops_nothing(train, capfd, monkeypatch):
    original = Path.unlink

    def unlink(path: Path, missing_ok: bool = False) -> None:
        if path.name == "predictions_val.csv":
            raise OSError(30, os.strerror(30), str(path))
        original(path, missing_ok)

    monkeypatch.setattr(Path, "unlink", unlink)
    assert train() == 0
    said = capfd.readouterr().err
    assert "logs/predictions_val.csv: cannot be written: Read-only file system; train" in said


def test_leftovers_that_cannot_be_removed_stop_nothing(train, monkeypatch):
    Path("logs").mkdir()
    temporary_name(Path("logs/report.html")).mkdir()  # unlink fails
    assert train("train.epochs=1") == 0


def test_the_same_trouble_with_a_record_is_told_once_until_it_is_over(train, capfd, monkeypatch):
    original, calls = records.write_history, []

    def write(path: Path, history: list) -> None:
        calls.append(path)
        if len(calls) not in (4, 5):  # the first is before the first epoch
            raise OSError(28 if len(calls) == 3 else 30, os.strerror(28 if len(calls) == 3 else 30))
        original(path, history)

    monkeypatch.setattr(records, "write_history", write)
    assert train("train.epochs=9") == 0
    said = capfd.readouterr().err
    assert said.count("logs/history.csv: cannot be written: Read-only file system") == 2
    assert said.count("logs/history.csv: cannot be written: No space left on device") == 1


def test_a_full_log_says_so_once_and_stops_nothing(train):
    assert train("train.epochs=1") == 0
    with open("logs/train.log", "ab") as file:
        file.write(bytes(100_000))
    status, output = run(Path.cwd(), "--resume", "train.epochs=3", room=100_000)
    assert status == 0, output
    assert output.count("train.log: cannot be written: File too large; training goes on") == 1
    assert "Traceback" not in output and "Logging error" not in output


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_console_that_is_gone_stops_nothing(unbuffered):
    with open("/dev/full", "w") as full:
        process = subprocess.run(
            [sys.executable, str(ROOT / "train.py"), *TINY],
            stderr=full,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    assert process.returncode == 0
    assert "test_acc" in Path("logs/train.log").read_text()


def test_a_folder_that_cannot_be_made_is_refused_at_the_start(train, capfd):
    Path("checkpoints").write_text("a file where the folder should be")
    assert train() == 2
    said = capfd.readouterr().err
    assert "checkpoints: cannot be written: File exists" in said and "Traceback" not in said


# -- two runs at once -------------------------------------------------------------------------


@pytest.mark.parametrize("words", [[], ["--resume"], ["--resume", "checkpoints/last.pth"]])
def test_of_two_runs_started_at_once_exactly_one_trains(words):
    Path("checkpoints").mkdir()
    shutil.copy(FIRST_FORMAT, "checkpoints/last.pth")
    settings = [*([] if words else TINY), "train.epochs=30"]
    runs = [Process(Path.cwd(), *words, *settings, output=f"{n}.txt") for n in range(2)]
    (first, said), (second, refusal) = sorted(
        ((one, one.output) for one in runs), key=lambda pair: pair[0].wait()
    )
    assert (first.wait(), second.wait()) == (0, 2), said.read_text() + refusal.read_text()
    refusal = refusal.read_text()
    assert f"checkpoints: process {first.process.pid} on " in refusal
    assert refusal.count("\n") == 1 and "train.py" in refusal
    assert load_checkpoint(Path("checkpoints/last.pth"))["epoch"] == 30


@pytest.mark.parametrize("words", [["--resume"], ["--resume", "checkpoints/last.pth"]])
def test_what_another_run_saved_just_before_the_lock_is_gone_on_from(train, monkeypatch, words):
    assert train("train.epochs=3", "checkpoint.every_epochs=1") == 0
    shutil.move("checkpoints/last.pth", "newer.pth")
    shutil.copy("checkpoints/epoch_001.pth", "checkpoints/last.pth")
    original = RunFolder.lock

    def lock(folder: RunFolder) -> None:
        if Path("newer.pth").exists():
            os.replace("newer.pth", "checkpoints/last.pth")
        original(folder)

    monkeypatch.setattr(RunFolder, "lock", lock)
    assert train(*words, "train.epochs=4") == 0
    log = Path("logs/train.log").read_text()
    assert "==== resumed from checkpoints/last.pth: epoch 4, step 12" in log


HOLDER = """
import time
from filelock import FileLock
lock = FileLock("checkpoints/.run.lock")
lock.acquire()
print("held", flush=True)
time.sleep(0.5)
"""


def test_a_lock_is_waited_for_where_its_owner_is_dead():
    """Loader processes outlive a run that was killed, for seconds, and hold its lock."""
    holder = subprocess.Popen(
        [
            *(sys.executable, "-c"),
            HOLDER,
        ],
        stdout=subprocess.PIPE,
    )
    run = RunFolder(None)
    run.checkpoints.mkdir()
    holder.stdout.readline()
    with run:
        assert holder.wait() == 0
    holder.stdout.close()
