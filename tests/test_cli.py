"""The command line: what it refuses, what it says, and how a run that is not yet one ends."""

import importlib
import os
import re
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from conftest import ROOT, TINY, finish
from PIL import Image
from processes import CONTEXT, start_server

import train as script
from cnn import cli
from cnn.errors import Refused
from cnn.records.records import Records
from cnn.training.saver import Saver
from cnn.utils.checkpoint import load_checkpoint
from cnn.utils.signals import StopSignals


def refusal(capfd, *words: str) -> str:
    """The message for a command line that cannot be read."""
    assert script.main([*TINY, *words]) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: ") and message.count("\n") == 1
    return message


@pytest.mark.parametrize("mode", ["--dry-run", "--drill", "--find-lr", "--print-config"])
@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "checkpoints/last.pth"]])
def test_what_looks_at_settings_cannot_go_with_a_resume(capfd, mode, resume):
    assert f"{mode} cannot go with --resume" in refusal(capfd, mode, *resume)


def test_of_two_modes_none_is_dropped_in_silence(capfd):
    assert "--dry-run cannot go with --find-lr" in refusal(capfd, "--find-lr", "--dry-run")


def test_a_dry_run_that_fails_tells_no_way_to_go_on_with_it(train, capfd, monkeypatch):
    assert train("--dry-run") == 0

    def fails(saver: Saver, improved: bool) -> None:
        saver.save()
        raise ArithmeticError("on purpose")

    monkeypatch.setattr(Saver, "end_epoch", fails)
    assert train("--dry-run") == 1
    said = capfd.readouterr().err
    assert "on purpose" in said and "go on with" not in said
    assert train() == 1
    assert "go on with" in capfd.readouterr().err, "as a run of its own does"


@pytest.mark.parametrize(
    "words, setting",
    [
        (["--epochs", "5"], "train.epochs=5"),
        (["--epochs=5"], "train.epochs=5"),
        (["--optim.lr", "0.1"], "optim.lr=0.1"),
        (["--batch-size", "32"], "data.batch_size=32"),
        (["--epochs"], "train.epochs=..."),
        (["--gpus", "2"], "key=value: train.epochs=5"),
    ],
)
def test_an_option_that_is_a_setting_is_told_how_to_write(capfd, words, setting):
    said = refusal(capfd, *words)
    assert "unrecognized arguments: --" in said and f"settings are written {setting}\n" in said


def test_a_file_of_settings_is_told_where_to_go(capfd):
    said = refusal(capfd, "configs/mnist.yaml")
    assert "expected key=value, got 'configs/mnist.yaml'; a file goes after --config\n" in said


def test_the_examples_of_the_help_stand_below_each_other(capfd):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    help = capfd.readouterr().out
    assert help.count("\n    python train.py") == help.count("\n    python") == 7
    assert "\npython" not in help


SCRIPTS = ["train", "evaluate", "predict", "export", "compare", "sweep"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_script_has_the_same_kind_of_help(capfd, name):
    with pytest.raises(SystemExit) as ended:
        importlib.import_module(name).main(["--help"])
    assert ended.value.code == 0
    help = capfd.readouterr().out
    assert re.search(r"\n\n[A-Z][a-z]+s [^\n]*\.\n\nCommands:\n\n    python ", help), "a verb first"
    assert ("key=value" in help.split("positional")[0]) == (name != "compare")


@pytest.mark.parametrize("name", SCRIPTS)
@pytest.mark.parametrize("words", [["--unknown"], ["nothing.png", "--unknown"]])
def test_every_script_refuses_in_one_line_that_begins_with_error(capfd, name, words):
    assert importlib.import_module(name).main(words) == 2
    message = capfd.readouterr().err
    assert message.startswith("error: unrecognized") or "required" in message
    assert message.startswith("error: ") and message.count("\n") == 1


# Found by Python at its start; presses Ctrl-C as a module begins to be imported.
CTRL_C = """
import os, signal, sys

class Press:
    def find_spec(name, path=None, target=None):
        if name == "{module}":
            sys.meta_path.remove(Press)
            os.kill(os.getpid(), signal.{name})

sys.meta_path.insert(0, Press)
"""


@pytest.mark.parametrize(
    "name, module",
    [("SIGINT", "torch"), ("SIGTERM", "cnn.training.setup")],
)
def test_a_signal_while_torch_is_imported_is_one_line_and_its_status(name, module):
    Path("sitecustomize.py").write_text(CTRL_C.format(name=name, module=module))
    status, output = finish(*TINY)
    assert status == 128 + getattr(signal, name)
    assert output == f"warning: stopped by {name}\n"


def test_ctrl_c_while_the_settings_are_read_is_one_line_and_130(train, capfd, monkeypatch):
    def interrupted(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli.Command, "load_config", interrupted)
    assert train() == 130
    assert capfd.readouterr().err == "stopped by SIGINT\n"


def test_a_signal_over_which_a_library_s_clean_up_falls_is_still_a_signal(capfd):
    def act(log, stop):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise AttributeError("a lock that was not made yet")

    assert cli.run_command(cli.Task(act)) == 143
    assert capfd.readouterr().err == "warning: stopped by SIGTERM\n"


def test_a_failure_after_a_signal_that_waits_is_told_as_what_it_is(capfd):
    def act(log, stop):
        stop.deferred = True
        try:
            signal.raise_signal(signal.SIGTERM)
            raise ArithmeticError("on purpose")
        finally:
            stop.deferred = False

    assert cli.run_command(cli.Task(act)) == 1
    assert "ArithmeticError: on purpose" in capfd.readouterr().err


def test_the_status_of_another_library_s_error_is_no_exit_status():
    class NotFound(OSError):
        status = 404

    def act(log, stop):
        raise NotFound

    assert cli.run_command(cli.Task(act)) == 1


# -- signals that come when the outcome stands --------------------------------------------------


@pytest.fixture
def late(monkeypatch) -> None:
    """A SIGTERM while the handlers are taken down."""
    original = StopSignals.uninstall

    def uninstall(stop: StopSignals, **options) -> None:
        signal.raise_signal(signal.SIGTERM)
        original(stop, **options)

    monkeypatch.setattr(StopSignals, "uninstall", uninstall)


def refuse(log, stop):
    raise Refused("on purpose")


@pytest.mark.parametrize("act, status", [(lambda log, stop: None, 0), (refuse, 2)])
def test_a_signal_after_the_outcome_changes_neither_status_nor_message(late, capfd, act, status):
    before = signal.getsignal(signal.SIGTERM)
    assert cli.run_command(cli.Task(act)) == status
    assert capfd.readouterr().err == ("error: on purpose\n" if status else "")
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_while_a_refusal_is_said_changes_nothing(capfd, monkeypatch):
    original = cli.logger.error

    def log_and_signal(*words):
        signal.raise_signal(signal.SIGTERM)
        original(*words)

    monkeypatch.setattr(cli.logger, "error", log_and_signal)
    assert cli.run_command(cli.Task(refuse)) == 2
    assert capfd.readouterr().err == "error: on purpose\n"


def test_a_signal_while_a_finished_run_writes_its_report_changes_nothing(train, monkeypatch):
    original = Records.__exit__

    def leave(*words):
        signal.raise_signal(signal.SIGTERM)
        original(*words)

    monkeypatch.setattr(Records, "__exit__", leave)
    assert train("train.epochs=1") == 0


# Found by Python at its start; sends a SIGTERM as the process goes: in atexit, and later.
LAST_INSTANT = """
import atexit, os, signal

class Late:
    def __del__(self, kill=os.kill, process=os.getpid(), number=signal.SIGTERM):
        kill(process, number)

atexit.register(os.kill, os.getpid(), signal.SIGTERM)
os.late = Late()
"""


@pytest.mark.parametrize("words, status", [(["train.epochs=1"], 0), (["device=cuda:99"], 2)])
def test_a_signal_while_the_process_goes_changes_nothing(words, status):
    Path("sitecustomize.py").write_text(LAST_INSTANT)
    found, output = finish(*TINY, *words)
    assert found == status, output
    assert "stopped by" not in output


def test_a_stop_that_a_clean_up_swallows_is_silent_and_counts_at_the_next_check(capfd):
    class Library:
        def __del__(self):
            signal.raise_signal(signal.SIGTERM)

    def act(log, stop):
        Library()
        stop.check()

    assert cli.run_command(cli.Task(act)) == 143
    assert capfd.readouterr().err == "warning: stopped by SIGTERM\n"


@pytest.mark.parametrize("where", ["before it is said", "while it is said"])
def test_ctrl_c_around_a_mistake_in_the_settings_is_one_line(train, capfd, monkeypatch, where):
    class Interrupted(str):
        def __str__(self):
            raise KeyboardInterrupt

    def refused(self):
        raise KeyboardInterrupt if where.startswith("before") else Refused(Interrupted("x"))

    monkeypatch.setattr(cli.Command, "load_config", refused)
    assert train() == 130
    assert capfd.readouterr().err == "stopped by SIGINT\n"


def test_in_another_thread_than_the_main_one_it_is_refused(train, capfd):
    said = []
    thread = threading.Thread(target=lambda: said.append(train()))
    thread.start()
    thread.join()
    assert said == [2]
    assert capfd.readouterr().err.startswith("error: signals reach the main thread alone")


# -- streams that are not there -----------------------------------------------------------------


def run_closed(folder: Path, line: str, closed: set[int]) -> None:
    """Runs a script in a process that has just begun, without these of its streams."""
    os.chdir(folder)
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        os.close(number)
        if number in closed:
            setattr(sys, name, None)  # as Python begins then
        else:
            os.open(os.devnull, os.O_RDWR)
    sys.argv = line.split()
    os._exit(importlib.import_module(sys.argv[0]).main(None))


def test_with_its_streams_closed_every_script_does_its_work():
    words = f"exec {sys.executable} {ROOT}/train.py {' '.join(TINY)} train.epochs=1 <&- >&- 2>&-"
    assert subprocess.run(["bash", "-c", words], check=False).returncode == 0
    assert load_checkpoint(Path("checkpoints/last.pth"))["epoch"] == 1
    Image.new("L", (8, 8)).save("a.png")
    start_server()
    for line, closed, file in [
        ("evaluate --json a.json", {2}, "a.json"),
        ("predict a.png --csv a.csv", {1, 2}, "a.csv"),
        ("export --format weights", {1, 2}, "checkpoints/best_weights.pt"),
        ("compare logs", {1}, "logs/compare.html"),
    ]:
        process = CONTEXT.Process(target=run_closed, args=(Path.cwd(), line, closed))
        process.start()
        process.join(60)
        assert process.exitcode == 0, line
        assert Path(file).stat().st_size > 0
    assert b"warning" not in Path("a.csv").read_bytes()


def test_without_sys_stdout_and_stderr_it_trains(train, monkeypatch):
    """As under pythonw, and in some services."""
    monkeypatch.setattr(sys, "stdout", None)
    monkeypatch.setattr(sys, "stderr", None)
    assert train("train.epochs=1") == 0
    sys.stdout.close()
    sys.stderr.close()
