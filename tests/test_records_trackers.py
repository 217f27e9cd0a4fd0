"""Trackers have every epoch once, whatever stops the run, and never stop or delay it."""

import contextlib
import importlib.util
import json
import shutil
import signal
import sqlite3
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from conftest import ROOT, TINY
from processes import Process, run
from test_training_distributed import wait_for_epoch
from test_training_runs import move_to, write_folder

from cnn.records import trackers
from cnn.records.history import read_rows
from cnn.training.saver import Saver
from cnn.training.state import TIME_COLUMNS

STORE = """
import json, os, signal, threading
from pathlib import Path

file = Path("store.jsonl")
gate = threading.Event()

def note(**what):
    with file.open("a") as lines:
        print(json.dumps(what), file=lines)

class Store:
    def open(self, key, name, settings):
        before = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
        note(what="open", key=key, name=name, settings=settings)
        self.key = key
        epochs = [line["epoch"] for line in before if line["what"] == "send" and line["key"] == key]
        return max(epochs, default=0)

    def send(self, epoch, metrics):
        self.end_at(f"before {epoch}")
        note(what="send", key=self.key, epoch=epoch, metrics=metrics)
        self.end_at(f"after {epoch}")

    def end_at(self, place):
        if Path("end_at").exists() and Path("end_at").read_text() == place:
            os.kill(os.getpid(), signal.SIGKILL)

    def close(self, files, *, is_finished):
        sizes = {str(path): path.stat().st_size for path in files}
        note(what="close", files=sizes, is_finished=is_finished)

class FailsToOpen(Store):
    def open(self, *_):
        raise ConnectionError("no route")

class FailsToSend(Store):
    def send(self, epoch, metrics):
        if epoch > 2:
            raise ConnectionError("no route")
        super().send(epoch, metrics)

class FailsToClose(Store):
    def close(self, files, *, is_finished):
        raise ConnectionError("no route")

class HangsInOpen(Store):
    def open(self, *arguments):
        hang()
        return super().open(*arguments)

class HangsInSend(Store):
    def send(self, epoch, metrics):
        if epoch == 2:
            hang()
        super().send(epoch, metrics)

def hang():
    gate.wait(15)
    raise ConnectionError("no answer")
"""
STORED = "log.trackers=[store:Store]"


@pytest.fixture(autouse=True)
def store():
    """A module of trackers in the test's folder; afterwards, those that hang are let go."""
    Path("store.py").write_text(STORE)
    yield
    if module := sys.modules.pop("store", None):
        module.gate.set()
    for thread in living():
        thread.join()


def living() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if isinstance(thread, trackers.Sender)]


def noted(what: str) -> list[dict]:
    path = Path("store.jsonl")
    lines = path.read_text().splitlines() if path.exists() else []
    return [line for line in map(json.loads, lines) if line.pop("what") == what]


def epochs_sent() -> list[dict[str, str]]:
    """What was sent as rows of history.csv, in the order in which it was sent."""
    return [
        {"epoch": str(line["epoch"])} | {name: str(v) for name, v in line["metrics"].items()}
        for line in noted("send")
        if "val_loss" in line["metrics"]
    ]


def rows(logs: str = "logs") -> list[dict[str, str]]:
    """The rows of history.csv without the columns that measure time."""
    rows = read_rows(Path(logs, "history.csv"))
    return [{name: v for name, v in row.items() if name not in TIME_COLUMNS} for row in rows]


def stop_in_epoch(epoch: int, monkeypatch) -> None:
    """Has the next run stopped in the middle of an epoch."""
    original = Saver.between_steps

    def interrupt(saver: Saver) -> None:
        if saver.state.step == 4 * epoch - 2:
            signal.raise_signal(signal.SIGINT)
        original(saver)

    monkeypatch.setattr(Saver, "between_steps", interrupt)


# -- each epoch once -------------------------------------------------------------------------------


def test_a_run_that_is_stopped_and_resumed_is_one_run_with_each_epoch_once(train, monkeypatch):
    with monkeypatch.context() as patch:
        stop_in_epoch(3, patch)
        assert train("train.epochs=5", "run=a", STORED) == 128 + signal.SIGINT
    assert [line["epoch"] for line in noted("send")] == [1, 2]
    assert noted("close") == [{"files": {}, "is_finished": False}]
    assert train("--resume", "run=a") == 0
    assert epochs_sent() == rows("logs/a") and len(epochs_sent()) == 5
    *_, last = noted("send")
    result = json.loads(Path("logs/a/result.json").read_text())
    tested = {name: v for name, v in result["test"].items() if not name.endswith("_95")}
    assert (last["epoch"], last["metrics"]) == (5, tested)
    first, second = noted("open")
    assert first == second and first["name"] == "a"
    assert first["settings"]["data.batch_size"] == 16
    assert [line["is_finished"] for line in noted("close")] == [False, True]


def test_another_run_has_another_key_and_the_models_name(train):
    for _ in range(2):
        assert train(STORED, "train.epochs=1") == 0
        move_to(f"run {len(noted('open'))}")
    one, other = noted("open")
    assert one["key"] != other["key"]
    assert one["name"] == "simple_cnn on synthetic"
    assert len(epochs_sent()) == 2


def test_an_epoch_trained_twice_is_sent_once(train):
    assert train(STORED, "train.epochs=2") == 0
    shutil.copytree("checkpoints", "older")
    assert train("--resume", "train.epochs=4") == 0
    shutil.copytree("older", "checkpoints", dirs_exist_ok=True)
    assert train("--resume", "train.epochs=5") == 0
    assert [row["epoch"] for row in epochs_sent()] == list("12345")
    assert epochs_sent() == rows()


@pytest.mark.parametrize("place", ["before 3", "after 3"])
def test_a_run_killed_beside_the_send_has_each_epoch_once(tmp_path, place):
    Path("end_at").write_text(place)
    status, said = run(tmp_path, *TINY, "train.epochs=5", STORED)
    assert status == -signal.SIGKILL, said
    Path("end_at").unlink()
    assert len(epochs_sent()) == (2 if place == "before 3" else 3)
    status, said = run(tmp_path, "--resume")
    assert status == 0, said
    assert [row["epoch"] for row in epochs_sent()] == list("12345")
    assert epochs_sent() == rows()


def test_a_value_that_an_epoch_has_not_is_left_out(train):
    write_folder(Path("photos"), {"train/a": 6, "train/b": 6, "val/a": 6, "test/a": 6, "test/b": 6})
    words = ["data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8"]
    assert train(*words, STORED, "train.epochs=1") == 0
    (row,), (sent,) = rows(), epochs_sent()
    assert row.pop("val_auc") == "", "of one class"
    assert "val_auc" not in sent and sent.items() <= row.items()
    assert [name for name in row if name not in sent] == [name for name in row if not row[name]]


def test_a_dry_run_sends_nothing(train):
    assert train("--dry-run", STORED, "log.artifacts=true") == 0
    assert not noted("open") and not noted("send")


# -- trackers that fail or hang --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "sent"), [("FailsToOpen", []), ("FailsToSend", [1, 2]), ("FailsToClose", [1, 2, 3, 4])]
)
def test_a_tracker_that_fails_is_told_once_and_a_resume_sends_the_rest(train, capfd, name, sent):
    assert train(f"log.trackers=[store:{name}]", "train.epochs=4") == 0
    said = [line for line in capfd.readouterr().err.splitlines() if "no route" in line]
    assert len(said) == 1
    assert said[0].startswith(f"warning: log.trackers: store:{name}: cannot be written: ")
    assert [int(row["epoch"]) for row in epochs_sent()] == sent
    assert Path("logs/result.json").exists()
    assert train("--resume", STORED) == 0
    assert epochs_sent() == rows()
    assert len(epochs_sent()) == 4 and noted("close")[-1]["is_finished"]


@pytest.mark.parametrize(("name", "sent"), [("HangsInOpen", []), ("HangsInSend", [1])])
def test_a_tracker_that_hangs_delays_nothing(train, capfd, monkeypatch, name, sent):
    monkeypatch.setattr(trackers, "PATIENCE", 0.1)
    assert train(f"log.trackers=[store:{name}]", "train.epochs=4") == 0
    assert len(living()) == 1, "it hangs still"
    said = [line for line in capfd.readouterr().err.splitlines() if "log.trackers" in line]
    what = "has not taken everything; --resume sends the rest"
    assert said == [f"warning: log.trackers: store:{name} {what}"]
    assert [line["epoch"] for line in noted("send")] == sent
    assert train("--resume", STORED) == 0
    assert epochs_sent() == rows() and len(rows()) == 4


@pytest.mark.parametrize("name", ["store:Nothing", "nowhere:Store", "nothing"])
def test_a_tracker_that_does_not_exist_is_refused(train, capfd, name):
    assert train(f"log.trackers=[{name}]") == 2
    assert "log.trackers" in capfd.readouterr().err
    assert not Path("checkpoints/last.pth").exists()


# -- files -----------------------------------------------------------------------------------------


def test_a_refused_tracker_leaves_an_earlier_run_where_it_is(train):
    assert train() == 0
    assert train("log.trackers=[nowhere:Store]") == 2
    assert Path("checkpoints/last.pth").is_file() and not Path("checkpoints/archive").exists()


def test_epochs_of_before_that_stay_are_told(train, capfd):
    words = ["log.trackers=[store:Store]", "checkpoint.every_epochs=1"]
    assert train(*words, "train.epochs=3") == 0
    capfd.readouterr()
    resume = [
        "--resume",
        "checkpoints/epoch_001.pth",
        "optim.lr=0.01",
        "log.trackers=[store:Store]",
    ]
    assert train(*resume) == 0
    said = capfd.readouterr().err
    assert "log.trackers: store:Store has epoch 3 already, and keeps it; run=NAME" in said


@pytest.mark.parametrize("report", [True, False])
def test_artifacts_are_files_that_exist(train, report):
    words = [STORED, "log.artifacts=true", f"log.report={report}".lower()]
    assert train(*words, "train.epochs=1") == 0
    (close,) = noted("close")
    names = {
        str(Path(file).relative_to(Path.cwd()) if Path(file).is_absolute() else file)
        for file in close["files"]
    }
    assert {"checkpoints/best.pth", "logs/config.yaml", "logs/history.csv"} < names
    assert ("logs/report.html" in names) == report == ("logs/curves.png" in names)
    assert min(close["files"].values()) > 0


def test_a_stopped_run_has_its_files_and_is_not_finished(train, monkeypatch):
    stop_in_epoch(2, monkeypatch)
    assert train(STORED, "log.artifacts=true") == 128 + signal.SIGINT
    (close,) = noted("close")
    assert "checkpoints/best.pth" in close["files"] and not close["is_finished"]


# -- MLflow, W&B, SwanLab --------------------------------------------------------------------------

# Seconds of epochs, so that a run can be killed in any of them.
LONG = [
    *TINY,
    "train.epochs=24",
    "checkpoint.every_steps=20",
    "data.args={num_images: 700, num_test: 20, num_classes: 3, image_size: 8, noise: 60}",
]
Values = list[tuple[int, str, float]]  # an epoch, a metric, its value


def start_until_epoch(
    epoch: int | None,
    environment: dict[str, str],
    *words: str,
    wait: Callable[[Path, int], None] = wait_for_epoch,
) -> None:
    """Starts or resumes a run, and kills it when history.csv, or a store, has so many epochs."""
    is_new = not Path("checkpoints").exists()
    process = Process(Path.cwd(), *words, "--resume", rank=environment)  # of one process
    if epoch:
        wait(Path.cwd(), epoch)
        process.kill()
    status, said = process.wait(), process.output.read_text()
    assert status == (-signal.SIGKILL if epoch else 0), said
    assert "log.trackers: " not in said and ("resumed from" not in said) == is_new, said


def skip_without(package: str) -> None:
    if not importlib.util.find_spec(package):  # importing it takes seconds
        pytest.skip(f"{package} is not installed")


def assert_is_history(values: Values) -> None:
    """A store has every value of history.csv and of the test, and has it once."""
    tested = json.loads(Path("logs/result.json").read_text())["test"]
    expected = [
        (int(row["epoch"]), name, float(value))
        for row in rows()
        for name, value in row.items()
        if name != "epoch"
    ]
    last = expected[-1][0]
    expected += [(last, name, v) for name, v in tested.items() if not name.endswith("_95")]
    assert sorted(values) == sorted(expected)


def read_mlflow(query: str) -> list[tuple]:
    """Rows of MLflow's database, without its slow import; none before there is a table."""
    with contextlib.closing(sqlite3.connect("runs.db", timeout=60)) as store:
        try:
            return store.execute(query).fetchall()
        except sqlite3.OperationalError:
            return []


def wait_for_mlflow(_: Path, epoch: int) -> None:
    deadline = time.monotonic() + 100
    while len(read_mlflow("select distinct step from metrics")) < epoch:
        assert time.monotonic() < deadline, Path("output.txt").read_text()
        time.sleep(0.02)


def mlflow_after_kills(kills: list[int], num_epochs: int) -> None:
    skip_without("mlflow")
    environment = {"MLFLOW_TRACKING_URI": "sqlite:///runs.db"}
    words = [*LONG, f"train.epochs={num_epochs}", "log.trackers=[mlflow]"]
    for epoch in [*kills, None]:
        start_until_epoch(epoch, environment, *words, wait=wait_for_mlflow)

    assert read_mlflow("select status from runs") == [("FINISHED",)]
    settings = dict(read_mlflow("select key, value from params"))
    assert settings["optim.lr"] == "0.05" and len(settings) > 50
    assert_is_history(read_mlflow("select step, key, value from metrics"))


def test_mlflow_has_a_killed_run_once_with_each_epoch_once():
    mlflow_after_kills([1], 30)


@pytest.mark.soak
def test_mlflow_has_a_run_killed_three_times_once_with_each_epoch_once():
    mlflow_after_kills([5, 40, 90], 150)


def records(path: Path) -> Iterator[bytes]:
    """The records of a LevelDB log after its 7 bytes, as both packages write it."""
    data, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if (left := 2**15 - at % 2**15) < 7:  # the end of a block
            at += left
            continue
        size, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        record += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def values_of_wandb(folder: Path) -> Values:
    from wandb.proto.wandb_internal_pb2 import Record

    values = []
    for record in map(Record.FromString, records(next(folder.glob("*.wandb")))):
        items = {item.key or item.nested_key[0]: item.value_json for item in record.history.item}
        row = {name: json.loads(text) for name, text in items.items() if not name.startswith("_")}
        epoch = row.pop("epoch", None)
        values += [(epoch, name, value) for name, value in row.items()]
    return values


def values_of_swanlab(folder: Path) -> Values:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    found = map(Record.FromString, records(next(folder.glob("*.swanlab"))))
    scalars = [record.scalar for record in found if record.HasField("scalar")]
    own = [one for one in scalars if not one.key.startswith("__swanlab__")]
    return [(one.step, one.key, one.value.number) for one in own]


@pytest.mark.soak
@pytest.mark.parametrize(
    ("package", "tracker", "folders", "values_of"),
    [
        ("wandb", "wandb_tracker:WandB", "wandb/offline-run-*", values_of_wandb),
        ("swanlab", "swanlab_tracker:SwanLab", "swanlog/run-*", values_of_swanlab),
    ],
    ids=["wandb", "swanlab"],
)
def test_the_latest_offline_folder_of_an_example_has_the_whole_run(
    package, tracker, folders, values_of
):
    skip_without(package)
    Path("examples").symlink_to(ROOT / "examples")
    environment = {f"{package.upper()}_MODE": "offline"}
    words = [*LONG, f"log.trackers=[examples.{tracker}]", "log.artifacts=true"]
    start_until_epoch(3, environment, *words)
    start_until_epoch(None, environment, *words)
    *_, latest = sorted(Path().glob(folders))
    assert_is_history(values_of(latest))
    assert (latest / "files/best.pth").exists()
    assert len({folder.name.rpartition("-")[2] for folder in Path().glob(folders)}) == 1, "ids"
