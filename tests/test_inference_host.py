"""cnn.inference in a program of somebody else: its threads, generators, settings and forks."""

import contextlib
import errno
import io
import os
import random
import re
import subprocess
import sys
import threading
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import train as train_script
from cnn.errors import BadImage, DataFailed
from cnn.inference import load
from cnn.inference.host import OwnGenerator

RGB = np.random.default_rng(0).integers(0, 256, (90, 100, 3), dtype=np.uint8)


def trained(folder: Path, *words: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_script.main([*TINY, *words]) == 0
    return folder / "checkpoints" / "best.pth"


@pytest.fixture(scope="module")
def best(tmp_path_factory) -> Path:
    args = "{num_images: 24, num_test: 8, num_classes: 4, image_size: 64, channels: 3}"
    return trained(tmp_path_factory.mktemp("host"), f"data.args={args}", "model.name=simple_cnn")


@pytest.fixture(scope="module")
def drawing(tmp_path_factory) -> Path:
    """A model of somebody's own that draws in evaluation mode, from torch and from numpy."""
    folder = tmp_path_factory.mktemp("drawing")
    (folder / "draws_in_a_host.py").write_text(
        "import numpy as np\n"
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(in_channels * 64, num_classes)\n"
        "    def forward(self, images):\n"
        "        images = nn.functional.dropout(images.flatten(1), 0.5, training=True)\n"
        "        return self.layer(images) * np.random.rand()\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        words = ["model.name=draws_in_a_host:Net", "model.args={}", "data.name=digits"]
        yield trained(folder, *words, "data.args={}", "checkpoint.monitor=val_acc")


def draw() -> tuple[float, ...]:
    return random.random(), float(np.random.rand()), torch.rand(1).item()


def seed() -> None:
    torch.manual_seed(1), np.random.seed(1), random.seed(1)


def in_threads(number: int, work) -> list[threading.Thread]:
    threads = [threading.Thread(target=work, args=(index,)) for index in range(number)]
    for thread in threads:
        thread.start()
    return threads


# ---------------------------------------------------------------------------------------------
# Threads and generators


def test_other_threads_draw_as_if_nothing_were_predicted(best):
    predict, running = load(best), True
    expected, wrong = predict(RGB), []

    def work(_) -> None:
        while running:
            if predict(RGB) != expected:
                wrong.append(1)

    seed()
    wanted = [draw() for _ in range(3000)]
    seed()
    threads = in_threads(4, work)
    drawn = [draw() for _ in range(3000)]
    load(best)
    drawn.append(draw())
    running = False
    for thread in threads:
        thread.join()
    assert drawn == [*wanted, drawn[-1]] and not wrong
    seed()
    assert [draw() for _ in range(3001)] == drawn, "loading draws nothing either"


@pytest.mark.parametrize(
    "name", ["kaiming_normal_", "xavier_uniform_", "trunc_normal_", "orthogonal_", "uniform_"]
)
def test_the_initial_weights_of_a_model_to_load_are_drawn_from_nobodys_generator(name):
    seed()
    wanted = draw()
    seed()
    with OwnGenerator():
        weights = getattr(torch.nn.init, name)(torch.zeros(20, 30))
    assert draw() == wanted and weights.unique().numel() > 300


def test_a_model_that_draws_says_the_same_in_every_thread(drawing):
    predict = load(drawing, "model.name=draws_in_a_host:Net")
    picture, said = RGB[:8, :8, 0], []
    expected = predict(picture)
    threads = in_threads(4, lambda _: said.extend(predict(picture) for _ in range(30)))
    for thread in threads:
        thread.join()
    assert said == [expected] * 120
    seed()
    wanted = draw()
    seed()
    load(drawing, "model.name=draws_in_a_host:Net")(picture)
    assert draw() == wanted


# ---------------------------------------------------------------------------------------------
# The settings of the process

STATE = """
import gc, os, signal, sys, threading, warnings
import PIL.Image, PIL.ImageFile
import numpy as np
import torch
PIL.Image.MAX_IMAGE_PIXELS = 12345678
warnings.simplefilter("error")
def state():
    return [
        torch.get_num_threads(), torch.get_default_dtype(), str(torch.get_default_device()),
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.initial_seed(),
        torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.benchmark,
        torch.multiprocessing.get_sharing_strategy(), warnings.showwarning,
        PIL.Image.MAX_IMAGE_PIXELS, PIL.ImageFile.LOAD_TRUNCATED_IMAGES, gc.isenabled(),
        gc.get_freeze_count(), {n: signal.getsignal(n) for n in signal.valid_signals()},
        sys.excepthook, sys.unraisablehook, sys.path[:], os.getcwd(), np.geterr(),
    ]
before = state()
from cnn.inference import load
from cnn.inference.host import OwnGenerator
assert state() == before, "the import"
assert "torchvision" not in sys.modules, "a second of every script's start"
more = lambda: [*state(), warnings.filters[:]]
before = more()
threads = [threading.Thread(target=load, args=(sys.argv[1],)) for _ in range(3)]
for thread in threads: thread.start()
for thread in threads: thread.join()
assert more() == before, "the first loads, in several threads at once"
predict = load(sys.argv[1])
assert more() == before, "load"
predict([sys.argv[2]] * 3), predict(sys.argv[2]), list(predict.predict_each([None, "no.png"]))
assert more() == before, "a prediction"
"""


def run_program(code: str, *words: str) -> None:
    """Runs a program in a process of its own, with as many threads as torch would take."""
    env = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words],
        env=env | {"PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr


def test_the_settings_of_the_process_stay_also_when_several_threads_load_at_first(best):
    Image.fromarray(RGB).save("a.png")
    run_program(STATE, str(best), "a.png")


@contextlib.contextmanager
def default(kind: str, value):
    before = getattr(torch, f"get_default_{kind}")()
    getattr(torch, f"set_default_{kind}")(value)
    try:
        yield
    finally:
        getattr(torch, f"set_default_{kind}")(None if kind == "device" else before)


AROUND = {
    "float64": lambda: default("dtype", torch.float64),
    "bfloat16": lambda: default("dtype", torch.bfloat16),
    "device": lambda: default("device", "meta"),
    "with a device": lambda: torch.device("meta"),
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
}


@pytest.mark.parametrize("around", AROUND.values(), ids=AROUND)
def test_a_model_loaded_under_other_settings_is_the_same(best, around):
    expected, usual = load(best)(RGB), load(best).model.state_dict()
    with around():
        predict = load(best)
        assert predict(RGB) == expected
    assert predict(RGB) == expected
    for name, tensor in predict.model.state_dict().items():
        assert torch.equal(tensor, usual[name]) and tensor.dtype == usual[name].dtype
    assert all(p.requires_grad and not p.is_inference() for p in predict.model.parameters())


@pytest.mark.parametrize("around", [*AROUND][:2])
def test_so_is_one_of_somebodys_own(drawing, around):
    words = [drawing, "model.name=draws_in_a_host:Net"]
    expected = load(*words)(RGB)
    with AROUND[around]():
        predict = load(*words)
    assert predict(RGB).classes == expected.classes
    assert {p.dtype for p in predict.model.parameters()} == {torch.float32}


OF_OTHERS = """
import torch
from cnn.inference import load
class Net(torch.nn.Module):
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.part = load("part.pth", "model.name=draws_in_a_host:Net").model
    def forward(self, images):
        return self.part(images)
"""


def test_a_model_that_loads_another_one_is_loaded(drawing, monkeypatch):
    monkeypatch.syspath_prepend(".")
    Path("part.pth").write_bytes(drawing.read_bytes())
    Path("made_of_another.py").write_text(OF_OTHERS)
    words = ["model.name=made_of_another:Net", "model.args={}", "data.name=digits", "data.args={}"]
    assert train_script.main([*TINY, *words, "train.epochs=1"]) == 0
    loaded = []
    arguments = "checkpoints/best.pth", "model.name=made_of_another:Net"
    thread = threading.Thread(target=lambda: loaded.append(load(*arguments)), daemon=True)
    thread.start()
    thread.join(60)
    assert loaded, "it waits for itself"
    assert loaded[0](RGB[:8, :8, 0]) == loaded[0](RGB[:8, :8, 0])


def test_files_that_the_process_cannot_open_are_no_bad_pictures(best, monkeypatch):
    def fail(*_):
        raise OSError(errno.EMFILE, "Too many open files")

    predict = load(best)
    monkeypatch.setattr(Image, "open", fail)
    with pytest.raises(DataFailed, match="Too many open files"):
        predict("a.png")


# ---------------------------------------------------------------------------------------------
# Forks

FORKS = """
import os, signal, sys
import torch
from cnn.inference import load
from cnn.inference.host import OwnGenerator
def in_child():
    child = os.fork()
    if child == 0:
        signal.alarm(20)
        answers = predict(sys.argv[2]), predict([sys.argv[2]] * 3)[2]
        os._exit(0 if all(sum(answer.probabilities) > 0.99 for answer in answers) else 3)
    return os.waitpid(child, 0)[1]
for threads in 2, 8, 1:
    torch.set_num_threads(threads)
    predict = load(sys.argv[1])
    assert in_child() == 0, f"after load, {threads} threads"
    predict(sys.argv[2])
    assert in_child() == 0, f"after a prediction, {threads} threads"
torch.set_num_threads(8)
torch.randn(600, 600) @ torch.randn(600, 600) + torch.randn(600, 600)
assert in_child() == 0, "after other work"
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_a_process_forked_after_loading_answers(best):
    Image.fromarray(np.tile(RGB, (6, 6, 1))).save("a.png")
    run_program(FORKS, str(best), "a.png")


# ---------------------------------------------------------------------------------------------
# What is given


def opened(name: str):
    return open(name, "rb")


def closed(one):
    one.close()
    return one


def after_its_with():
    with Image.open("a.png") as image:
        return image


class Stream:
    """A file that can only be read, such as the body of an answer of a server."""

    def __init__(self, data: bytes):
        self.data = io.BytesIO(data)

    def read(self, number: int = -1) -> bytes:
        return self.data.read(number)


class Broken:
    """A file whose connection is gone."""

    def read(self, number: int = -1) -> bytes:
        raise ConnectionResetError("connection lost")


TAKEN = {
    "bytes": lambda data: data,
    "bytearray": bytearray,
    "memoryview": memoryview,
    "BytesIO": io.BytesIO,
    "a file": lambda _: opened("a.png"),
    "a stream": Stream,
    "an array": lambda _: RGB,
    "BGR turned round": lambda _: RGB[:, :, ::-1].copy()[:, :, ::-1],
    "a lazy PIL image": lambda _: Image.open("a.png"),
}


@pytest.mark.parametrize("make", TAKEN.values(), ids=TAKEN)
def test_a_picture_is_taken_as(best, make):
    Image.fromarray(RGB).save("a.png")
    predict = load(best)
    one = make(Path("a.png").read_bytes())
    assert predict(one) == predict("a.png")
    if isinstance(one, io.BytesIO | io.BufferedReader | Image.Image):
        with one:
            assert len(set(map(str, predict([one] * 8)))) == 1


NOT_TAKEN = {
    "None": (lambda: None, "got NoneType"),
    "a number": (lambda: 5, "got int"),
    "a tensor": (lambda: torch.zeros(3, 8, 8), "got Tensor"),
    "floats": (lambda: RGB / 255, "got float64 (90, 100, 3)"),
    "a batch": (lambda: RGB[None], "got uint8 (1, 90, 100, 3)"),
    "channels first": (lambda: RGB.transpose(2, 0, 1), "got uint8 (3, 90, 100)"),
    "an empty array": (lambda: RGB[:0], "got uint8 (0, 100, 3)"),
    "an empty picture": (lambda: Image.new("RGB", (0, 5)), "got a PIL image of 0 x 5 pixels"),
    "no bytes": (lambda: b"", "cannot identify image file"),
    "an empty file": (lambda: io.BytesIO(), "cannot identify image file"),
    "text": (lambda: io.TextIOWrapper(io.BytesIO(b"a")), "got TextIOWrapper"),
    "a file of text": (lambda: io.StringIO("a"), "got StringIO"),
    "a closed file": (lambda: closed(opened("a.png")), "seek of closed file"),
    "a closed picture": (lambda: closed(Image.open("a.png")), "Operation on closed image"),
    "a closed array": (lambda: closed(Image.fromarray(RGB)), "Operation on closed image"),
    "a picture after its with": (after_its_with, "AssertionError; expected a path"),
    "a broken stream": (Broken, "connection lost"),
    "a list in a list": (lambda: ["a.png"], "got list"),
    "the name of a file as bytes": (lambda: b"a.png", "cannot identify image file"),
    "no name": (lambda: "", ": the file is gone"),
}


@pytest.mark.parametrize("make, expected", NOT_TAKEN.values(), ids=NOT_TAKEN)
def test_what_is_no_picture_is_named_and_the_others_are_predicted(best, make, expected):
    Image.fromarray(RGB).save("a.png")
    predict, one = load(best), make()
    said = list(predict.predict_each(["a.png", one, RGB]))
    assert said[0] == said[2] == predict("a.png") and expected in str(said[1])
    with pytest.raises(ValueError, match=re.escape(expected)):
        predict(["a.png", one])
    if not isinstance(one, list):
        with pytest.raises(BadImage, match=re.escape(expected)):
            predict(one)
        assert [type(answer) for answer in predict.predict_each(one)] == [BadImage]
    if "got" in expected:
        assert "; expected a path, bytes of an image file, an open binary file" in str(said[1])


@pytest.mark.parametrize("top", [0, -1, 1.5, "2", True])
def test_a_number_of_classes_that_cannot_be_is_refused_at_once(best, top):
    with pytest.raises(ValueError, match="top: expected a whole number of at least 1, or None"):
        load(best).predict_each(["a.png"], top)


def test_as_many_classes_as_there_are_is_the_most(best):
    predict = load(best)
    assert len(predict(RGB, top=np.int64(2)).classes) == 2
    assert predict(RGB, top=99) == predict(RGB)
    assert predict(iter([RGB, RGB]), 1) == [predict(RGB, 1)] * 2


def test_a_warning_of_pillow_is_the_programs_to_hear(best):
    with warnings.catch_warnings(record=True) as heard, pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("always")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 5000)
        Image.fromarray(RGB).save("a.png")
        load(best)("a.png")
        patch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
        with pytest.raises(BadImage, match="exceeds limit of 2000 pixels"):
            load(best)("a.png")
    assert [warning.category for warning in heard] == [Image.DecompressionBombWarning]
