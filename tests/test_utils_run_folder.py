"""What is in a run's folders is never written over: it is moved as a whole, or left as it was."""

import os
import shutil
import time
from pathlib import Path

import pytest
from conftest import assert_same_run

from cnn.errors import Refused, Stopped
from cnn.utils import run_folder
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.files import write_atomically, write_text
from cnn.utils.run_folder import RunFolder

FILES = ("checkpoints/best.pth", "checkpoints/last.pth", "logs/history.csv", "logs/train.log")


def lay_out() -> dict[str, str]:
    """A run's files, each with its name in it."""
    for name in FILES:
        Path(name).parent.mkdir(exist_ok=True)
        Path(name).write_text(f"2026-03-29 02:30:00 {name}")
    return contents()


def contents() -> dict[str, str]:
    """All files but the lock, by name."""
    files = [path for path in Path().rglob("*") if path.is_file() and path.name != ".run.lock"]
    return {path.as_posix(): path.read_text() for path in files}


def test_what_is_set_aside_in_the_same_second_gets_a_folder_of_its_own(monkeypatch):
    """The clock is set back, or the hour is the one that comes twice."""
    monkeypatch.setattr(time, "strftime", lambda *_: "2026-10-25_02-30-00")
    run = RunFolder(None)
    run.checkpoints.mkdir()
    kept = []
    for number in range(3):
        run.best.write_text(f"number {number}")
        kept.append(run.set_aside([run.best]))
    assert [(folder / "best.pth").read_text() for folder in kept] == [
        *("number 0", "number 1", "number 2")
    ]


def test_what_is_set_aside_comes_to_no_folder_of_an_earlier_run(monkeypatch):
    monkeypatch.setattr(time, "strftime", lambda *_: "2026-03-29_02-30-00")
    lay_out()
    run = RunFolder(None)
    logs = run.archive()
    run.best.write_text("of the next run")
    target = run.set_aside([run.best])
    assert target.name != logs.name
    assert "checkpoints/best.pth" in Path("checkpoints/archive", logs.name, "best.pth").read_text()


def test_a_file_of_the_users_own_that_ends_with_tmp_is_left_alone(train):
    Path("checkpoints").mkdir()
    for path in (own := [Path("checkpoints/.notes.tmp"), Path("checkpoints/.last.pth.tmp")]):
        path.write_text("mine")
    assert train("train.epochs=1") == 0
    assert [path.read_text() for path in own] == ["mine", "mine"]


def test_two_that_write_one_file_at_once_leave_a_whole_one():
    def slowly(file) -> None:
        write_text(Path("a"), "whole")  # another process, in the middle of this one's write
        file.write(b"this one")

    write_atomically(Path("a"), slowly)
    assert contents() == {"a": "this one"}


def test_a_best_pth_of_another_run_is_kept_though_it_is_not_ahead(train):
    assert train("train.epochs=1", "seed=7") == 0
    shutil.move("checkpoints", "others")
    shutil.rmtree("logs")
    assert train("train.epochs=2") == 0
    other = Path("others/best.pth").read_bytes()
    Path("checkpoints/best.pth").write_bytes(other)
    assert train("--resume", "train.epochs=3") == 0
    kept = [path.read_bytes() for path in Path("checkpoints/archive").glob("*/best.pth")]
    assert kept == [other]
    assert "checkpoints/best.pth is of another run; kept as" in Path("logs/train.log").read_text()


# -- all or nothing ---------------------------------------------------------------------------


class Killed(BaseException):
    """The process is gone in the middle of something."""


def cut_off(monkeypatch, number: int, error: type[BaseException]) -> None:
    """Lets so many files be moved; then the process is killed, or the disk says no, once."""
    original, left = shutil.move, [number]

    def move(source, target):
        left[0] -= 1
        if left[0] == -1:
            raise error(30, "Read-only file system", str(target))
        return original(source, target)

    monkeypatch.setattr(run_folder.shutil, "move", move)


@pytest.mark.parametrize("number", range(len(FILES)))
def test_an_archiving_that_is_killed_is_undone_at_the_next_start(number):
    before = lay_out()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        cut_off(patch, number, Killed)
        RunFolder(None).archive()
    assert number == 0 or not all(Path(name).exists() for name in FILES)
    with RunFolder(None) as run:
        now = {name: text for name, text in contents().items() if not name.endswith(".run.json")}
        assert now == before
        logs = run.archive()
    assert [path.name for path in logs.parent.iterdir()] == [logs.name], "in one folder"
    assert {path.name for path in logs.iterdir()} == {"history.csv", "train.log"}
    kept = Path("checkpoints/archive", logs.name)
    assert {path.name for path in kept.iterdir()} == {"best.pth", "last.pth"}


@pytest.mark.parametrize("number", range(len(FILES)))
@pytest.mark.parametrize("error", [OSError, lambda *_: Stopped(15)])
def test_an_archiving_refused_by_the_disk_or_stopped_leaves_all_where_it_was(number, error):
    before = lay_out()
    with pytest.MonkeyPatch.context() as patch, pytest.raises((OSError, Stopped)):
        cut_off(patch, number, error)
        RunFolder(None).archive()
    assert contents() == before


@pytest.mark.parametrize("number", [1, 3])
def test_a_fresh_start_killed_while_it_archives_leaves_the_run_before_to_go_on(train, number):
    assert train("train.epochs=1") == 0
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        cut_off(patch, number, Killed)
        train("train.epochs=1")
    assert train("--resume", "train.epochs=2") == 0
    assert load_checkpoint(Path("checkpoints/last.pth"))["epoch"] == 2
    assert not list(Path("checkpoints/archive").iterdir())
    assert Path("logs/train.log").read_text().count("epoch 1/1") == 1


@pytest.mark.parametrize("blocked", ["logs", "checkpoints"])
def test_a_start_that_cannot_archive_changes_nothing(train, capfd, blocked):
    assert train("train.epochs=1") == 0
    Path(blocked, "archive").symlink_to("nowhere/at/all")
    before = {path: path.stat().st_ino for path in Path().glob("*/*.*") if path.suffix != ".lock"}
    assert train("train.epochs=1") == 2
    assert f"{blocked}/archive: cannot be written" in capfd.readouterr().err
    for path, inode in before.items():
        assert path.stat().st_ino == inode, path


@pytest.mark.parametrize(
    "words",
    [
        ["--resume", "run=nothere", "data.args={num_images: -1}"],
        ["--resume", "checkpoints/x.pth", "run=other", "device=cuda:99"],
        ["run=nothere", "model.name=resnet19"],
    ],
)
def test_a_refused_start_leaves_no_empty_folders(train, words):
    if "checkpoints/x.pth" in words:
        assert train("train.epochs=1") == 0
        shutil.move("checkpoints/last.pth", "checkpoints/x.pth")
    before = set(Path().rglob("*"))
    tiny = (
        ["--config", str(Path(__file__).with_name("tiny.yaml"))] if "run=nothere" in words else []
    )
    assert train(*tiny, *words) == 2
    assert set(Path().rglob("*")) == before


def test_a_folder_that_was_there_stays_though_it_is_empty(train):
    Path("logs/a").mkdir(parents=True)
    assert train("run=a", "model.name=resnet19") == 2
    assert Path("logs/a").is_dir() and not Path("checkpoints").exists()


def test_a_refused_second_process_takes_nothing_from_the_first(monkeypatch):
    with RunFolder("a") as first:
        monkeypatch.setattr(os.path, "lexists", lambda path: False)  # both found it missing
        with pytest.raises(Refused), RunFolder("a"):
            pass
        assert first.checkpoints.is_dir() and first.logs.folder.is_dir()


# -- going on under another name --------------------------------------------------------------


def test_a_finished_run_gone_on_with_under_another_name_has_all_its_files(train):
    assert train("log.report=true") == 0
    assert train("--resume", "checkpoints/last.pth", "run=other") == 0
    for kind in ("logs", "checkpoints"):
        names = [
            {path.name for path in Path(kind, run).iterdir() if path.is_file()}
            for run in (".", "other")
        ]
        assert names[1] == names[0] - {".run.json"}, kind
    shutil.copytree("checkpoints/other", "o/checkpoints")
    shutil.copytree("logs/other", "o/logs")
    assert_same_run(".", "o")
    assert train("--resume", "run=other", "train.epochs=3") == 0
