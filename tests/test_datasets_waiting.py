"""Batches that are late or never come: what is told, what a signal does, and how the run ends."""

import errno
import os
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import numpy as np  # noqa: F401  for what labels are made of
import pytest
import torch
from conftest import TINY, assert_same_run
from processes import Process, Ranks, run, run_ranks
from test_datasets_bad_files import FOLDER, photos

from cnn.datasets import decode
from cnn.datasets.images import UserImages
from cnn.errors import Refused
from cnn.utils.checkpoint import load_checkpoint


@pytest.fixture(autouse=True)
def module_of_its_own(monkeypatch):
    monkeypatch.delitem(sys.modules, "slides", raising=False)


WORKERS = [*TINY, "data.in_memory=false", "data.num_workers=1", "data.batch_size=4"]

# A dataset of the user's; `after` is called in the process that reads, after so many images each.
READER = """
import errno, multiprocessing, os, resource, time
from pathlib import Path
import torch
from cnn.datasets import workers

workers.WARN_EVERY = 1

def after(part, index):
{after}

class Data:
    def __init__(self, part, number):
        self.part, self.targets = part, [index % 2 for index in range(number)]
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        after(self.part, index)
        return torch.full((1, 8, 8), index, dtype=torch.uint8), self.targets[index]

def data(root):
    return {{"train": Data("train", 40), "val": Data("val", 8), "test": Data("test", 8),
            "classes": ["a", "b"]}}
"""


def reader(what: str, part: str = "train", images: int = 120 + 30) -> list[str]:
    """The settings of data with which something happens when so many images have been read.

    By then the statistics have read the 40 training images twice, and the first epoch once more.
    """
    after = f"""
    if part == "{part}":
        with open("calls" + os.environ.get("RANK", ""), "ab") as file:
            file.write(b".")
        if os.path.getsize(file.name) == {images}:
            open("there", "w").close()
            {what}
"""
    Path("slides.py").write_text(READER.format(after=after))
    return ["data.name=slides:data", "data.args={}", "train.epochs=3"]


def unbroken_run(*words: str) -> None:
    status, output = run(Path.cwd(), *WORKERS, *reader("pass"), *words)
    assert status == 0, output
    forget("whole")


def forget(name: str | None = None) -> None:
    """Moves the run away, or removes it."""
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path(name, folder)) if name else shutil.rmtree(folder)
    for file in (*Path.cwd().glob("calls*"), Path("there")):
        file.unlink(missing_ok=True)


def stopped(process: Process, number: int | None = signal.SIGTERM) -> str:
    """Sends it a signal, and waits for the end that it asks for; gives what was said."""
    try:
        if number is not None:
            process.kill(number)
        status = process.wait()
    finally:
        process.kill()
    assert status == 128 + signal.SIGTERM, process.output.read_text()
    return process.output.read_text()


def interruptible(path: str) -> None:
    deadline = time.monotonic() + 60
    while not Path(path).exists():
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize("part, images", [("train", 120 + 30), ("val", 8 + 6)])
def test_a_signal_ends_the_wait_for_a_loader_that_never_answers(part, images):
    unbroken_run()
    process = Process(Path.cwd(), *WORKERS, *reader("time.sleep(1000)", part, images))
    interruptible("there")
    said = stopped(process)
    assert "go on with: " in said and "stopped by SIGTERM" in said and "Traceback" not in said
    status, output = run(Path.cwd(), "--resume")
    assert status == 0, output
    assert_same_run("whole", ".")


def test_a_signal_ends_the_wait_without_loader_processes_too():
    words = [*WORKERS, *reader("time.sleep(1000)"), "data.num_workers=0"]
    process = Process(Path.cwd(), *words)
    interruptible("there")
    stopped(process)
    saved = load_checkpoint(Path("checkpoints/last.pth"))
    assert (saved["epoch"], saved["unfinished_epoch"]["batch"]) == (1, 7), "of 4 images each"


def test_of_several_processes_one_that_waits_is_signalled_and_all_stop_before_the_same_batch():
    words = [*WORKERS, *reader("pass"), "train.epochs=2"]
    run_ranks(2, Path.cwd(), *words)
    forget("whole")
    wait = "time.sleep(1000) if os.environ['RANK'] == '1' else 0"
    reader(wait, images=80 + 20 + 10)  # half of them are this rank's
    ranks = Ranks(2, Path.cwd(), *words)
    interruptible("there")
    time.sleep(0.5)  # let the other come to where it waits for this one
    os.kill(ranks.processes[1].process.pid, signal.SIGTERM)
    for process in ranks.processes:
        stopped(process, None)
    run_ranks(2, Path.cwd(), "--resume")
    assert_same_run("whole", ".")


def test_a_slow_batch_is_waited_for_and_it_is_told_which_one():
    unbroken_run()
    status, output = run(Path.cwd(), *WORKERS, *reader("time.sleep(2.5)"))
    assert status == 0, output
    told = r"warning: waiting for batch 8 of epoch 2 from the loader processes: [12] s\n"
    assert re.search(told, output), output
    assert_same_run("whole", ".")


# What happens in the loader process with the last image of a batch; what is said of it.
SCARCE = {
    "time.sleep(0.5); resource.setrlimit(resource.RLIMIT_NOFILE, (3, 3))": "Too many open files",
    "resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))": "the next batch: RuntimeError: ",
    "raise MemoryError": "train[",
}


def test_what_a_loader_process_has_too_little_of_is_told_and_nothing_is_lost():
    unbroken_run()
    for what, expected in SCARCE.items():
        status, output = run(Path.cwd(), *WORKERS, *reader(what, images=120 + 32))
        assert status == 1, output
        assert output.count("error: ") == 1 and "Traceback" not in output, output
        said = output.partition("error: ")[2]
        assert expected in said and "; fewer data.num_workers need less (ulimit -n" in said
        saved = load_checkpoint(Path("checkpoints/last.pth"))
        assert (saved["epoch"], saved["unfinished_epoch"]["batch"]) == (1, 7)
        status, output = run(Path.cwd(), "--resume")
        assert status == 0, output
        assert_same_run("whole", ".")
        forget()


# What happens before the loader processes start.
BIRTHS = {
    "fails": (
        "def fork(): raise BlockingIOError(errno.EAGAIN, 'unavailable')\nos.fork = fork\n",
        ["the next batch: BlockingIOError: [Errno 11] unavailable ("],
    ),
    "ends": (
        """from multiprocessing import resource_tracker
resource_tracker.ensure_running()
multiprocessing.set_start_method("spawn", force=True)
multiprocessing.set_executable("/bin/false")
""",
        # Told by torch or by us, or from Python 3.14 by multiprocessing, whoever sees it first.
        ["exit", "the next batch: BrokenPipeError: [Errno 32] Broken pipe ("],
    ),
}


@pytest.mark.parametrize("birth", BIRTHS)
def test_a_loader_process_that_does_not_come_up_ends_the_run_with_the_reason(birth):
    what, expected = BIRTHS[birth]
    words = [*WORKERS, *reader("pass")]
    with open("slides.py", "a") as file:
        file.write(what)
    status, output = run(Path.cwd(), *words)
    said = output.partition("error: ")[2]
    assert status == 1 and any(words in said for words in expected), output
    assert output.count("error: ") == 1 and "Traceback" not in output, output
    assert "fewer data.num_workers need less" in output
    assert load_checkpoint(Path("checkpoints/last.pth"))["step"] == 0


@pytest.mark.skipif(sys.version_info >= (3, 14), reason="Python waits for no dead process")
def test_a_signal_ends_the_wait_for_a_dead_loader_process_to_take_its_data():
    words = [*WORKERS, *reader("pass"), "data.augment=[slides:Large]"]
    with open("slides.py", "a") as file:
        file.write(BIRTHS["ends"][0])
        file.write("class Large:\n    def __init__(self): self.pad = bytes(300_000)\n")
        file.write("    def __call__(self, image): return image\n")
    process = Process(Path.cwd(), *words)
    interruptible("checkpoints")
    while "sgd lr" not in process.output.read_text():
        time.sleep(0.02)
    time.sleep(0.3)  # more than a pipe takes; it hangs
    stopped(process)
    assert load_checkpoint(Path("checkpoints/last.pth"))["step"] == 0


def test_too_few_descriptors_are_no_bad_image_to_be_left_out(train, monkeypatch, capfd):
    photos()
    original, calls = decode.Image.open, []

    def fails(path):
        calls.append(path)
        if len(calls) == 75:
            raise OSError(errno.EMFILE, "Too many open files", str(path))
        return original(path)

    monkeypatch.setattr(decode.Image, "open", fails)
    assert train(*FOLDER, "data.on_bad_image=skip") == 1
    said = capfd.readouterr().err
    assert ".jpg: Too many open files; fewer data.num_workers need less" in said
    assert "left out" not in said and "Traceback" not in said
    assert train("--resume") == 0


# -- a dataset of the user's own ------------------------------------------------------------------

WRONG = {
    "raise ValueError('no such slide\\nat all')": "ValueError: no such slide (slides.py:8)",
    "raise KeyError(index)": "KeyError: ",
    "eval('1 +')": "SyntaxError: invalid syntax",
    "raise MemoryError": "MemoryError (slides.py:8)",
    "open('share/17.png')": "FileNotFoundError: [Errno 2] No such file or directory: 'share/17.png'",
    "del self.targets[:]": "IndexError: list index out of range (slides.py:",
    "return torch.ones(1, 8, 8), 1, 2": "expected (image, label), got tuple",
    "return None": "expected (image, label), got NoneType",
    "return torch.ones(8), 1": "expected a PIL image",
    "return torch.ones(3, 8, 8), 1": "error: the next batch: RuntimeError: ",
}


def data_that(what: str, reads: int) -> list[str]:
    """The settings of a dataset of the user's that does something from so many readings on."""
    Path("slides.py").write_text(
        "import torch\n"
        "class Data:\n"
        "    def __init__(self): self.targets, self.reads = [0, 1] * 20, 0\n"
        "    def __len__(self): return 40\n"
        "    def __getitem__(self, index):\n"
        "        self.reads += 1\n"
        f"        if self.reads >= {reads}:\n"
        f"            {what}\n"
        "        return torch.rand(1, 8, 8), self.targets[index]\n"
        "def data(root): return {'train': Data(), 'classes': ['a', 'b']}\n"
    )
    return ["data.name=slides:data", "data.args={}", "train.epochs=20"]


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("what", WRONG)
def test_an_error_in_a_dataset_of_the_users_is_told_in_a_line_and_the_run_saved(
    what, workers, train, capfd
):
    words = data_that(what, reads=100)  # the statistics take 64, of 32 images
    assert train(*words, f"data.num_workers={workers}") == 1
    said = capfd.readouterr().err
    assert said.count("error: ") == 1 and "Traceback" not in said, said
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    named = "error: slides:data train[" in line or "ones(3" in what
    assert named and WRONG[what] in line, said
    assert ("fewer data.num_workers need less" in line) == ("MemoryError" in what)
    assert load_checkpoint(Path("checkpoints/last.pth"))["step"] > 0


@pytest.mark.parametrize("what", [what for what in WRONG if "ones(3" not in what])
def test_an_error_in_a_dataset_of_the_users_is_refused_before_the_first_epoch(what, train, capfd):
    assert train(*data_that(what, reads=10)) == 2
    said = capfd.readouterr().err
    assert "Traceback" not in said and said.count("error: ") == 1, said
    assert WRONG[what] in said.splitlines()[-1] and not Path("checkpoints/last.pth").exists()


def test_an_error_while_the_labels_are_read_is_refused_too(train, capfd):
    words = data_that("raise ValueError('no label')", reads=10)
    path = Path("slides.py")
    path.write_text(path.read_text().replace("self.targets, ", "self.marks, ").replace(
        "self.targets[", "self.marks["
    ))  # fmt: skip
    assert train(*words) == 2
    assert "error: slides:data train[9]: ValueError: no label (slides.py:" in capfd.readouterr().err


@pytest.mark.parametrize("labels, expected", [
    ("[0, 1.7]", "[1]: expected a label that is a whole number, got 1.7 (float)"),
    ("[0, 1.0]", "[1]: expected a label that is a whole number, got 1.0 (float)"),
    ("np.array([0, 1]) / 1", "[0]: expected a label"),
    ("torch.tensor([1.0, 0.0])", "[0]: expected a label"),
    ("[0, '1']", "[1]: expected a label that is a whole number, got '1' (str)"),
    ("np.eye(2, dtype=int)", "[0]: expected a label that is a whole number, got [1, 0]"),
    ("[True, False]", None), ("np.array([0, 1], dtype=np.uint8)", None), ("torch.tensor([1, 0])", None),
    ("[torch.tensor(0), np.int16(1)]", None),
])  # fmt: skip
@pytest.mark.parametrize("known", ["targets", "marks"])
def test_labels_that_are_no_whole_numbers_are_refused_and_not_cut_off(known, labels, expected):
    class Given:
        def __init__(self):
            setattr(self, known, eval(labels))

        def __len__(self):
            return 2

        def __getitem__(self, index):
            return torch.rand(1, 8, 8), getattr(self, known)[index]

    if expected is None:
        assert sorted(UserImages(Given(), "mine train").labels.tolist()) == [0, 1]
        return
    with pytest.raises(Refused) as refused:
        UserImages(Given(), "mine train")
    assert f"mine train{expected}" in str(refused.value)
