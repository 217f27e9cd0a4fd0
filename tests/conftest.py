"""How the tests run train.py: in this process, or as a user does, and how they compare two runs."""

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import train as script
from cnn.drill.differences import differences
from cnn.training.state import TIME_COLUMNS
from cnn.utils.checkpoint import load_checkpoint

ROOT = Path(__file__).resolve().parents[1]
# sweep.py's file is none: it says what is tried, not what a run is.
RECIPES = [
    path
    for path in sorted((ROOT / "configs").glob("*.yaml"))
    if path.stem not in ("sweep", "folds")
]
TINY = ["--config", str(ROOT / "tests" / "tiny.yaml")]

torch.set_num_threads(1)  # another number changes bits, and the machine may be shared
# Also on a machine with GPUs the tests are of a CPU, whose bits, processes and files they count; what of
# them holds on a GPU too is tried by CNN_TEST_GPU=0 pytest tests/test_training_resume.py, say.
os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CNN_TEST_GPU", "")


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Three processes for the whole suite: two cores, and tests that wait; none for a part of it."""
    options = config.option
    part = options.file_or_dir or options.keyword or options.markexpr != "not soak"
    return 0 if part or options.capture == "no" else 3


@pytest.fixture(autouse=True)
def folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every test works in an empty folder, and remembers images nowhere else."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))  # an import path adds the folder it is used in
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def train() -> Callable[..., int]:
    """train.py in this process, with the tiny settings unless it resumes; gives the exit status."""

    def run(*words: str) -> int:
        tiny = [] if "--resume" in words or "--config" in words else TINY
        return script.main([*tiny, *words])

    return run


def start(*words: str, **options) -> subprocess.Popen:
    """train.py as a process of its own, in a session of its own so that it can be killed whole."""
    return subprocess.Popen(
        [sys.executable, str(ROOT / "train.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        **options,
    )


def finish(*words: str) -> tuple[int, str]:
    """train.py as a process, to its end; exit status and all it said."""
    process = start(*words)
    output, _ = process.communicate(timeout=120)
    return process.returncode, output


def assert_same_run(first: str | Path, second: str | Path) -> None:
    """Two runs' folders hold the same bits: last.pth, best.pth, history.csv but its times."""
    for name in ("last.pth", "best.pth"):
        one, other = (load_checkpoint(Path(run, "checkpoints", name)) for run in (first, second))
        one["config"]["run"] = other["config"]["run"] = None
        for free in [("data", "num_workers"), ("checkpoint", "every_steps"), ("train", "epochs"),
                     ("checkpoint", "every_epochs")]:  # fmt: skip
            one["config"][free[0]][free[1]] = other["config"][free[0]][free[1]] = None
        found = list(differences(one, other))
        assert not found, f"{name}: {found[:5]}"
    assert history(first) == history(second)


def history(run: str | Path) -> list[dict[str, str]]:
    """The rows of history.csv without the columns that measure time."""
    with open(Path(run, "logs", "history.csv"), encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    return [{key: value for key, value in row.items() if key not in TIME_COLUMNS} for row in rows]
