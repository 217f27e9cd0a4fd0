"""Images that go bad while a run goes on, and loader processes that are killed."""

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY, assert_same_run
from PIL import Image
from processes import run
from test_training_runs import write_folder

from cnn.datasets import decode
from cnn.datasets.decode import open_image
from cnn.datasets.images import FileImages, Files
from cnn.datasets.preprocessing import Form
from cnn.datasets.scan import SCAN
from cnn.errors import BadImage
from cnn.training import engine, setup
from cnn.utils.checkpoint import load_checkpoint

FOLDER = [
    *("data.name=folder", "data.root=photos", "data.args={}", "data.image_size=8"),
    *("data.in_memory=false", "data.cache_gb=0"),  # read again and again, not decoded once
    *("data.batch_size=4", "checkpoint.every_steps=1", "train.epochs=3"),
]


def photos() -> Path:
    write_folder(Path("photos"), {"cat": 15, "dog": 15})
    return Path("photos")


# Run in the loader's process, a worker or the main one, when it has made so many images.
BREAKER = """
import os, shutil, signal
from pathlib import Path

def after(image):
    calls = Path("calls")
    with open(calls, "ab") as file:
        file.write(b".")
    if calls.stat().st_size == {calls}:
        {what}
    return image
"""


def breaking(what: str, calls: int) -> str:
    """The setting that has something happen when so many training images have been made."""
    Path("breaker.py").write_text(BREAKER.format(what=what, calls=calls))
    return "data.augment=[flip, breaker:after]"


def go(*words: str) -> tuple[int, str]:
    """A run in this folder, as a process: exit status and all it said."""
    return run(Path.cwd(), *words)


def unbroken_run(*words: str) -> None:
    status, output = go(*TINY, *FOLDER, *words, breaking("pass", 1))
    assert status == 0, output
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path("whole", folder))
    Path("calls").unlink()


HIDE = "Path('photos/cat/3.jpg').rename('hidden.jpg') if Path('photos/cat/3.jpg').exists() else 0"


@pytest.mark.parametrize(
    "words", [[], ["data.num_workers=2"], ["train.accumulate=3"]], ids=["plain", "workers", "accum"]
)
def test_a_file_that_vanishes_stops_the_run_saved_at_that_very_batch(words):
    photos()
    unbroken_run(*words)
    status, output = go(*TINY, *FOLDER, *words, breaking(HIDE, 30))
    assert status == 1, output
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert (
        "error: photos/cat/3.jpg: the file is gone; put the image back, and the run resumes at this batch"
        in output
    )
    assert "go on with: python" in output and "--resume checkpoints/last.pth" in output
    status, output = go("--resume")
    assert (
        status == 2 and "photos/cat/3.jpg: No such file" in output or "data has changed" in output
    )
    Path("hidden.jpg").rename("photos/cat/3.jpg")
    status, output = go("--resume")
    assert status == 0, output
    assert_same_run("whole", ".")


def test_what_was_done_of_a_step_is_not_saved(monkeypatch, train):
    """The third of three batches fails: the state saved is that of before the first."""
    photos()
    assert train(*FOLDER, "train.accumulate=3", "train.epochs=1") == 0
    for folder in ("logs", "checkpoints"):
        shutil.move(folder, Path("whole", folder))
    original, calls = FileImages.picture, []

    def fails(self, index: int, form: Form):
        calls.append(index)
        if len(calls) == 4 * 3 + 10:  # image 10 of step 2: in its third batch
            raise BadImage(f"{self.name(index)}: torn")
        return original(self, index, form)

    with monkeypatch.context() as patch:
        patch.setattr(FileImages, "picture", fails)
        words = [*FOLDER, "train.accumulate=3", "train.epochs=1", "checkpoint.every_steps=null"]
        assert train(*words) == 1
    saved = load_checkpoint(Path("checkpoints/last.pth"))
    assert (saved["step"], saved["unfinished_epoch"]["batch"]) == (1, 3)
    assert train("--resume", "checkpoint.every_steps=1") == 0
    assert_same_run("whole", ".")


def test_a_file_that_stops_decoding_is_named(train, capfd):
    photos()
    spoil = "Path('photos/dog/7.jpg').write_bytes(b'no image')"
    status, output = go(*TINY, *FOLDER, breaking(spoil, 25))
    assert status == 1 and "error: photos/dog/7.jpg: cannot identify image file" in output, output
    assert "Traceback" not in output


@pytest.mark.parametrize("workers", ["0", "2"])
def test_skip_leaves_the_image_out_of_its_batch_with_a_warning(workers):
    photos()
    words = [*FOLDER, "data.on_bad_image=skip", f"data.num_workers={workers}"]
    status, output = go(*TINY, *words, breaking(HIDE, 1))
    assert status == 0, output
    warned = "warning: photos/cat/3.jpg: the file is gone; left out of its batch"
    assert warned in output and "Traceback" not in output


def test_skip_is_the_same_every_time_and_for_any_number_of_workers(train, monkeypatch):
    photos()
    original = FileImages.picture

    def fails(self, index: int, form: Form):
        if self.name(index).endswith(("cat/3.jpg", "dog/1.jpg", "dog/2.jpg")):
            raise BadImage(f"{self.name(index)}: torn")
        return original(self, index, form)

    monkeypatch.setattr(FileImages, "picture", fails)
    words = [*FOLDER, "data.on_bad_image=skip"]
    for number in (0, 1, 2):
        assert train(*words, f"run=w{number}", f"data.num_workers={number}") == 0
        for folder in ("logs", "checkpoints"):
            shutil.move(Path(folder, f"w{number}"), Path(f"w{number}", folder))
    assert_same_run("w0", "w1")
    assert_same_run("w0", "w2")


def test_skip_stops_where_a_whole_folder_is_gone():
    photos()
    words = [*TINY, *FOLDER, "data.on_bad_image=skip"]
    status, output = go(*words, breaking("os.rename('photos', 'gone')", 20))
    assert status == 1 and "Traceback" not in output
    assert "nearly all of its batch of " in output, output


def test_a_killed_loader_process_stops_the_run_saved_and_exact():
    photos()
    words = ["data.num_workers=2"]
    unbroken_run(*words)
    kill = "os.kill(os.getpid(), signal.SIGKILL)"
    status, output = go(*TINY, *FOLDER, *words, breaking(kill, 30))
    assert status == 1, output
    assert output.count("error: ") == 1 and "Traceback" not in output
    assert (
        "error: a loader process was killed (exit code -9), most often because the memory" in output
    )
    assert load_checkpoint(Path("checkpoints/last.pth"))["epoch"] < 3
    status, output = go("--resume")
    assert status == 0, output
    assert_same_run("whole", ".")


def test_a_loader_process_that_dies_in_the_middle_of_a_step_does_not_break_into_it():
    photos()
    Path("killer.py").write_text(
        "import multiprocessing, time\n"
        "from torch import nn\n"
        "class Loss(nn.CrossEntropyLoss):\n"
        "    calls = 0\n"
        "    def forward(self, logits, labels):\n"
        "        self.calls += 1\n"
        "        if self.calls == 4:\n"
        "            for worker in multiprocessing.active_children(): worker.kill()\n"
        "            time.sleep(0.3)\n"
        "        return super().forward(logits, labels)\n"
    )
    words = ["data.num_workers=1", "loss.name=killer:Loss", "data.augment=[]"]
    status, output = go(*TINY, *FOLDER, *words, "checkpoint.every_steps=null")
    assert status == 1 and "error: a loader process was killed" in output, output
    saved = load_checkpoint(Path("checkpoints/last.pth"))
    assert saved["step"] == saved["unfinished_epoch"]["batch"] >= 4, "the step was finished"


def test_a_users_dataset_whose_file_is_gone_is_named(train, capfd):
    Path("reader.py").write_text(
        "import torch\n"
        "class Data:\n"
        "    def __init__(self): self.targets, self.read = [0, 1] * 20, 0\n"
        "    def __len__(self): return 40\n"
        "    def __getitem__(self, index):\n"
        "        self.read += 1\n"
        "        if self.read > 200: open('share/17.png')\n"
        "        return torch.rand(1, 8, 8), index % 2\n"
        "def data(root): return {'train': Data(), 'classes': ['a', 'b']}\n"
    )
    assert train("data.name=reader:data", "data.args={}", "train.epochs=20") == 1
    said = capfd.readouterr().err
    assert "error: reader:data train[" in said and "share/17.png" in said
    assert "Traceback" not in said and Path("checkpoints/last.pth").exists()


def png(width: int, height: int) -> bytes:
    """A PNG file that says it is that large."""
    header = struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def test_a_decompression_bomb_is_refused_before_it_is_decoded(train, capfd, monkeypatch):
    photos()
    Path("photos/cat/bomb.png").write_bytes(png(100_000, 100_000))
    assert train(*FOLDER) == 2
    assert "bomb.png: 100000 x 100000 pixels, more than 120,000,000" in capfd.readouterr().err
    with pytest.raises(BadImage, match="100000 x 100000 pixels"):
        open_image("photos/cat/bomb.png")
    monkeypatch.setattr(decode.Image.Image, "load", lambda self: pytest.fail("decoded"))
    with pytest.raises(BadImage):
        open_image("photos/cat/bomb.png")


@pytest.mark.filterwarnings("ignore::UserWarning")  # Pillow's
@pytest.mark.parametrize("suffix", ["jpg", "png", "gif", "bmp", "webp", "tif"])
def test_broken_images_raise_nothing_but_bad_image(suffix):
    draw = np.random.default_rng(0)
    pixels = draw.integers(0, 255, (9, 9, 3), dtype=np.uint8)
    path = Path(f"image.{suffix}")
    Image.fromarray(pixels).save(path)
    data = path.read_bytes()
    bad = 0
    for _ in range(60):
        damaged = bytearray(data[: draw.integers(1, len(data) + 1)])
        for position in draw.integers(0, len(damaged), 3):
            damaged[position] = draw.integers(256)
        path.write_bytes(damaged)
        try:
            decode.to_array(decode.open_image(path), 3)
        except BadImage:
            bad += 1
    assert bad > 10


def test_the_images_keep_their_policy_in_a_part():
    files = Files(Path(), [Path("a"), Path("b")], np.zeros(2, SCAN), [], skip=True)
    assert FileImages(files, [0, 1]).subset(np.array([1])).skip


def test_predictions_are_not_written_beside_other_images_than_their_own(train, capfd, monkeypatch):
    write_folder(Path("photos"), {"cat": 30, "dog": 30})
    original = engine.evaluate

    def lose_one(model, batches, *args, **keywords):
        if not Path("gone").exists():  # the first that is read again
            Path("gone").touch()
            decoded = FileImages.picture

            def gone(images, index, form):
                if index == 1 and images.name(index) == lost:
                    raise BadImage("the file is gone")
                return decoded(images, index, form)

            lost = next(iter(validated)).name(1)
            monkeypatch.setattr(FileImages, "picture", gone)
        return original(model, batches, *args, **keywords)

    validated = []
    loader = setup.build_loader

    def remember(cfg, images, *args, **keywords):
        if not keywords["training"]:
            validated.append(images)
        return loader(cfg, images, *args, **keywords)

    monkeypatch.setattr(setup, "build_loader", remember)
    monkeypatch.setattr(engine, "evaluate", lose_one)
    words = [
        *FOLDER,
        "data.on_bad_image=skip",
        "data.val_fraction=0.3",
        "train.epochs=1",
        "log.report=true",
    ]
    assert train(*words) == 0
    said = capfd.readouterr().err
    assert "predictions_val.csv" in said and "some images were left out of the evaluation" in said
    assert not Path("logs/predictions_val.csv").exists()
    assert "report.html: cannot" not in said and Path("logs/report.html").exists()
