"""The command line: what it refuses, what it says, and how a run that is not yet one ends."""

import signal
from pathlib import Path

import pytest
from conftest import TINY, finish

import train as script
from cnn import cli
from cnn.training.saver import Saver


def refusal(capfd, *words: str) -> str:
    """What is said to a command line that cannot be read."""
    with pytest.raises(SystemExit) as ended:
        script.main([*TINY, *words])
    assert ended.value.code == 2
    return capfd.readouterr().err


@pytest.mark.parametrize("mode", ["--dry-run", "--drill", "--find-lr", "--print-config"])
@pytest.mark.parametrize("resume", [["--resume"], ["--resume", "checkpoints/last.pth"]])
def test_what_looks_at_settings_cannot_go_with_a_resume(capfd, mode, resume):
    assert f"{mode} cannot go with --resume" in refusal(capfd, mode, *resume)


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
    assert "got 'configs/mnist.yaml'; settings of a file: --config configs/mnist.yaml" in said


def test_the_examples_of_the_help_stand_below_each_other(capfd):
    with pytest.raises(SystemExit) as ended:
        script.main(["--help"])
    assert ended.value.code == 0
    help = capfd.readouterr().out
    assert help.count("\n    python train.py") == help.count("\n    python") == 7
    assert "\npython" not in help


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

    assert cli.run(cli.Task(act)) == 143
    assert capfd.readouterr().err == "warning: stopped by SIGTERM\n"


def test_a_failure_after_a_signal_that_waits_is_told_as_what_it_is(capfd):
    def act(log, stop):
        stop.deferred = True
        try:
            signal.raise_signal(signal.SIGTERM)
            raise ArithmeticError("on purpose")
        finally:
            stop.deferred = False

    assert cli.run(cli.Task(act)) == 1
    assert "ArithmeticError: on purpose" in capfd.readouterr().err
