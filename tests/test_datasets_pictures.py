"""However photographs are decoded and kept, a run has the same pixels, and decodes each file once."""

import csv
import errno
import functools
import io
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, assert_same_run, history
from PIL import Image, ImageDraw, ImageFile
from processes import CONTEXT, run, start_server
from test_training_runs import move_to

import evaluate
import predict
from cnn.config import DataConfig, load_config
from cnn.datasets import cache, pictures, scan
from cnn.datasets.build import build_data
from cnn.datasets.loader import build_loader
from cnn.drill.differences import differences
from cnn.errors import Refused, Stopped
from cnn.utils import progress
from cnn.utils.checkpoint import load_checkpoint

# At 24 pixels, those of 100 or more on the shorter side are decoded at 1/2, 1/4 or 1/8.
SIZES = [(300, 200), (200, 300), (180, 180), (90, 64), (31, 40), (640, 120), (400, 350)]
EACH = ["resized_crop", "flip", "vflip", "rotate", "color", "crop", "erase"]
PHOTOS = ["data.name=folder", "data.image_size=24", "data.args={}", "data.batch_size=8"]
ALL = f"data.augment=[{', '.join(EACH)}]"


@pytest.fixture(autouse=True)
def files_are_believed_at_once(monkeypatch):
    monkeypatch.setattr(scan, "CLOCK", -(10**18))


def photograph(number: int, size: tuple[int, int]) -> Image.Image:
    """A sky, some shapes, and the noise of a camera."""
    draw, (width, height) = np.random.default_rng(number), size
    sky = np.linspace(draw.integers(60, 200, 3), draw.integers(60, 200, 3), height)  # H, 3
    image = Image.fromarray(np.repeat(sky[:, None], width, axis=1).astype(np.uint8))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y = draw.integers(0, width), draw.integers(0, height)
        side = draw.integers(4, max(8, min(size) // 2))
        pen.ellipse((x, y, x + side, y + side), fill=tuple(draw.integers(0, 256, 3).tolist()))
    pixels = np.asarray(image) + draw.normal(0, 6, (height, width, 3))
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


@functools.cache
def jpeg(number: int, size: tuple[int, int]) -> bytes:
    file = io.BytesIO()
    photograph(number, size).save(file, "JPEG", quality=90)
    return file.getvalue()


def write_photographs(folder: Path, number: int = 14, start: int = 0) -> Path:
    """Two classes with so many JPEG files each."""
    for label, name in enumerate(("cat", "dog")):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + number):
            (folder / name / f"{i:02}.jpg").write_bytes(jpeg(2 * i + label, SIZES[i % len(SIZES)]))
    return folder


@pytest.fixture
def photos(tmp_path) -> Path:
    return write_photographs(tmp_path / "photos")


@pytest.fixture
def decoded(monkeypatch) -> list:
    """The images of which pixels were decoded."""
    original, images = ImageFile.ImageFile.load, []

    def load(image):
        if image.tile:  # not yet decoded
            images.append(image)
        return original(image)

    monkeypatch.setattr(ImageFile.ImageFile, "load", load)
    return images


def settings(photos: Path, *augment: str, **others) -> DataConfig:
    words = [*PHOTOS, f"data.root={photos}", f"data.augment=[{', '.join(augment)}]"]
    return replace(load_config(None, words)[0].data, **others)


def batches(cfg: DataConfig) -> dict[str, list[torch.Tensor]]:
    """Everything that an epoch of training and an evaluation take, by split."""
    data, found = build_data(cfg, 0), {}
    for split, images in data.splits.items():
        is_training = split == "train"
        loader = build_loader(
            cfg, images, data.preprocessing, torch.device("cpu"), 0, training=is_training
        )
        taken = loader.train_batches(1) if is_training else loader.batches()
        found[split] = [tensor for images, labels, _ in taken for tensor in (images, labels)]
    return found


def assert_same(first: dict, second: dict) -> None:
    for split, tensors in first.items():
        assert len(tensors) == len(second[split]) > 0
        assert all(map(torch.equal, tensors, second[split])), split


def packs() -> list[Path]:
    return sorted(cache.cache_folder().glob(cache.PACKS))


# -- the same bits --------------------------------------------------------------------------------

KEPT = {
    "as it comes": {},
    "no cache": {"cache_gb": 0.0},
    "all in memory": {"in_memory": True},
    "all in memory, no cache": {"in_memory": True, "cache_gb": 0.0},
    "one by one": {"in_memory": False},
    "one by one, no cache": {"in_memory": False, "cache_gb": 0.0},
}


@pytest.mark.parametrize("augment", [EACH, *([name] for name in EACH)], ids=["all", *EACH])
def test_the_batches_are_the_same_wherever_the_pictures_are(augment, photos):
    fresh = batches(settings(photos, *augment))
    for kept in KEPT.values():
        shutil.rmtree(cache.cache_folder())
        assert_same(fresh, batches(settings(photos, *augment, **kept)))


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("cache_gb", [None, 0.0])
def test_worker_processes_make_the_same_batches(number, cache_gb, photos):
    alone = batches(settings(photos, *EACH))
    shutil.rmtree(cache.cache_folder())
    by_workers = {"in_memory": False, "num_workers": number, "cache_gb": cache_gb}
    assert_same(alone, batches(settings(photos, *EACH, **by_workers)))


def assert_same_figures(first: Path, second: Path) -> None:
    """As `assert_same_run` of runs whose settings differ in where the pictures are kept."""
    for name in ("last.pth", "best.pth"):
        one, other = (load_checkpoint(Path(run, "checkpoints", name)) for run in (first, second))
        del one["config"], other["config"]
        assert not list(differences(one, other)), name
    assert history(first) == history(second)


def words_of(photos: Path, memory: str, cache_gb: str, workers: int, augment: str) -> list[str]:
    kept = [f"data.in_memory={memory}", f"data.cache_gb={cache_gb}", f"data.num_workers={workers}"]
    every = ["checkpoint.every_steps=1", "train.epochs=2", "model.args={width: 4, dropout: 0.3}"]
    return [*TINY, *PHOTOS, f"data.root={photos}", augment, *kept, *every]


def run_broken(folder: Path, words: list[str], *resumed: str, passes: int = 4) -> Path:
    """A run that begins without a cache, is killed, and goes on without one."""
    shutil.rmtree(cache.cache_folder(), ignore_errors=True)
    status, output = run(folder, *words, trap=("training", passes, signal.SIGKILL))
    assert status == -signal.SIGKILL, output
    shutil.rmtree(cache.cache_folder(), ignore_errors=True)
    has_begun = (folder / "checkpoints/last.pth").exists()
    status, output = run(folder, *([] if has_begun else words), "--resume", *resumed)
    assert status == 0, output
    return folder


def test_a_run_on_photographs_that_is_killed_and_loses_its_cache_ends_the_same(photos, tmp_path):
    words = words_of(photos, "auto", "null", 0, ALL)
    assert run(tmp_path / "whole", *words)[0] == 0
    assert_same_run(tmp_path / "whole", run_broken(tmp_path / "broken", words))
    words = words_of(photos, "false", "0", 3, ALL)
    other = run_broken(tmp_path / "other", words, "data.num_workers=0", passes=1)
    assert_same_figures(tmp_path / "whole", other)


@pytest.mark.soak
@pytest.mark.parametrize("memory", ["auto", "true", "false"])
@pytest.mark.parametrize("augment", [EACH, *([name] for name in EACH)], ids=["all", *EACH])
def test_every_way_to_keep_photographs_gives_one_run(memory, augment, photos, tmp_path):
    augment, number = f"data.augment=[{', '.join(augment)}]", 0
    whole = tmp_path / "whole"
    assert run(whole, *words_of(photos, "auto", "null", 0, augment))[0] == 0
    for cache_gb in ("null", "0"):
        for workers in (0, 1, 3):
            words = words_of(photos, memory, cache_gb, workers, augment)
            folder = tmp_path / f"{cache_gb} {workers}"
            run_broken(folder, words, passes=number % 6)
            assert_same_figures(whole, folder)
            number += 1


# -- the pass ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("augment", [["flip"], EACH], ids=["exact", "with a margin"])
def test_each_file_is_decoded_once_and_never_again(augment, photos, decoded):
    cfg = settings(photos, *augment)
    first = batches(cfg)
    assert len(decoded) == 28
    assert_same(first, batches(cfg))
    for path in photos.rglob("*.jpg"):
        path.touch()
    assert_same(first, batches(cfg))
    for path in sorted(photos.rglob("*.jpg")):
        path.rename(path.with_name(f"moved_{path.name}"))
    assert_same(first, batches(cfg))
    assert len(decoded) == 28


def test_a_picture_that_is_added_is_decoded_alone(photos, decoded):
    batches(settings(photos, *EACH))
    photograph(99, (300, 200)).save(photos / "cat/x.jpg")
    decoded.clear()
    batches(settings(photos, *EACH))
    assert len(decoded) == 1


def test_another_size_is_decoded_again(photos, decoded):
    for size in (24, 32):
        decoded.clear()
        batches(settings(photos, *EACH, image_size=size))
        assert len(decoded) == 28


def start_and_die(cfg: DataConfig, folder: str, act: str, passes: int) -> None:
    """A start that is killed when it has called os.replace or os.fsync so many times."""
    os.setsid()
    os.environ["XDG_CACHE_HOME"] = folder
    pictures.PACK_BYTES, scan.SAVE_EVERY, scan.CHUNK = 4_000, -1, 4
    scan.CLOCK = -(10**18)
    original, left = getattr(os, act), [passes]

    def trapped(*args):
        if left[0] == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        return original(*args)

    setattr(os, act, trapped)
    batches(cfg)


@pytest.mark.parametrize("act, passes", [("replace", 0), ("fsync", 25), ("replace", 25)])
def test_a_start_that_is_killed_leaves_no_wrong_picture_and_goes_on(act, passes, photos, decoded):
    cfg = settings(photos, *EACH)
    start_server()
    process = CONTEXT.Process(
        target=start_and_die, args=(cfg, os.environ["XDG_CACHE_HOME"], act, passes)
    )
    process.start(), process.join(60)
    assert process.exitcode == -signal.SIGKILL
    goes_on = batches(cfg)
    assert (len(decoded) < 28) == (passes > 0)
    shutil.rmtree(cache.cache_folder())
    assert_same(batches(cfg), goes_on)


def test_a_long_pass_says_every_ten_seconds_how_far_it_is(photos, monkeypatch, caplog):
    clock = iter(range(0, 10_000, 4))
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    caplog.set_level(logging.INFO)
    build_data(settings(photos), 0)
    said = [message for message in caplog.messages if message.startswith(scan.LABEL)]
    assert any("  15/28  " in line and line.endswith(" left") for line in said), said
    assert len(said) >= 28 * 4 // 12 - 1


def test_a_file_whose_number_has_64_bits_is_read(photos, monkeypatch, decoded):
    """As network file systems number files."""
    original = os.stat

    def stat(path, **options):
        found = original(path, **options)
        facts = {name: getattr(found, name) for name in dir(found) if name.startswith("st_")}
        return SimpleNamespace(**facts | {"st_ino": 2**64 - 1})

    monkeypatch.setattr(scan.os, "stat", stat)
    for _ in range(2):
        batches(settings(photos))
    assert len(decoded) == 28


def test_a_start_that_is_stopped_keeps_what_it_has_read(photos, monkeypatch, decoded, caplog):
    caplog.set_level(logging.INFO)
    cfg, original = settings(photos, "flip"), scan._Reader.read

    def stopped_at_20(self, path, number):
        if len(decoded) >= 20:
            raise Stopped(signal.SIGINT)
        return original(self, path, number)

    with monkeypatch.context() as patch:
        patch.setattr(scan, "usable_cpus", lambda: 1)
        patch.setattr(scan._Reader, "read", stopped_at_20)
        with pytest.raises(Stopped):
            batches(cfg)
    assert "20 decoded pictures of 24 x 24 are kept in" in caplog.text
    decoded.clear()
    batches(cfg)
    assert len(decoded) == 28 - 20


def test_workers_decode_what_cannot_be_kept(photos):
    for cache_gb, expected in ((0, 2), (None, 0)):
        cfg = settings(photos, "resized_crop", cache_gb=cache_gb, num_workers=2)
        data = build_data(cfg, 0)
        loader = build_loader(
            cfg, data.train, data.preprocessing, torch.device("cpu"), 0, training=True
        )
        assert loader._loader.num_workers == expected


# -- the limit --------------------------------------------------------------------------------------


def test_pictures_without_room_are_told_and_decoded_again(photos, decoded, caplog):
    expected = batches(settings(photos, *EACH))
    shutil.rmtree(cache.cache_folder())
    decoded.clear()
    for _ in range(2):
        caplog.clear()
        assert_same(expected, batches(settings(photos, *EACH, cache_gb=2e-5)))
        assert "cannot be kept in" in caplog.text and "no room (data.cache_gb)" in caplog.text
    assert not packs()


def test_pictures_of_which_only_some_have_room_are_told(photos, caplog, monkeypatch):
    monkeypatch.setattr(pictures, "PACK_BYTES", 4_000)
    monkeypatch.setattr(cache, "FREE_SHARE", 1)
    batches(settings(photos, "flip", cache_gb=2e-5))
    assert 0 < sum(path.stat().st_size for path in packs()) <= 20_000
    assert "no room (data.cache_gb)" in caplog.text


def test_the_pictures_that_were_not_used_for_the_longest_time_go_first(photos, tmp_path, decoded):
    for number, name in enumerate(("old", "older")):
        batches(settings(write_photographs(tmp_path / name, 14, 20 + 20 * number)))
    older, old = packs_by_age()
    os.utime(older, (1, 1)), os.utime(old, (2, 2))
    used = sum(path.stat().st_size for path in packs())
    for _ in range(2):
        batches(settings(photos, cache_gb=used / 1e9))
        assert not older.exists() and old.exists() and len(packs()) == 2
    assert len(decoded) == 3 * 28


def packs_by_age() -> list[Path]:
    return sorted(packs(), key=lambda path: path.stat().st_mtime_ns)


def test_a_dataset_that_is_larger_than_its_cache_does_not_throw_its_own_pictures_out(
    photos, decoded
):
    """One of its two forms has room, and stays."""
    batches(settings(photos, *EACH))
    largest = max(path.stat().st_size for path in packs())
    shutil.rmtree(cache.cache_folder())
    cfg = settings(photos, *EACH, cache_gb=1.02 * largest / 1e9)
    batches(cfg)
    kept = packs()
    assert len(kept) == 1
    batches(cfg)
    assert packs() == kept


def is_full(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def is_forbidden(*_, **__) -> None:
    raise PermissionError(errno.EACCES, "Permission denied")


NO_DISK = {
    "nearly full": (cache.shutil, "disk_usage", lambda _: SimpleNamespace(free=10**9 + 99)),
    "full": (pictures, "write_atomically", is_full),
    "not ours to write": (pictures, "write_atomically", is_forbidden),
    "not ours to make": (Path, "mkdir", is_forbidden),
    "not ours to read": (torch, "from_file", is_forbidden),
    "not ours to remove": (Path, "unlink", is_forbidden),
}


@pytest.mark.parametrize("owner, act, instead", NO_DISK.values(), ids=NO_DISK)
def test_a_disk_that_takes_no_pictures_changes_no_pixel(owner, act, instead, photos, monkeypatch):
    cfg = settings(photos, *EACH)
    expected = batches(cfg)
    if owner is not torch:
        shutil.rmtree(cache.cache_folder())
    monkeypatch.setattr(owner, act, instead)
    for _ in range(2):
        assert_same(expected, batches(cfg))
    assert bool(packs()) == (act in ("unlink", "from_file"))


def test_a_full_disk_gives_the_same_run(photos, train, monkeypatch, capfd):
    words = [*PHOTOS, f"data.root={photos}", ALL]
    assert train(*words) == 0
    whole = move_to("whole")
    shutil.rmtree(cache.cache_folder())
    monkeypatch.setattr(pictures, "write_atomically", is_full)
    assert train(*words) == 0
    assert_same_run(whole, ".")
    said = capfd.readouterr().err
    assert f": {os.strerror(errno.ENOSPC)}" in said and "Traceback" not in said
    assert "data.cache_gb" not in said, "no setting helps"


def start_with_others(cfg: DataConfig, folder: str, output: str, begin) -> None:
    os.environ["XDG_CACHE_HOME"] = folder
    pictures.PACK_BYTES, scan.SAVE_EVERY, scan.CLOCK = 4_000, -1, -(10**18)
    begin.wait(60)
    torch.save(batches(cfg), output)


@pytest.mark.parametrize("cache_gb", [None, 6e-5], ids=["with room", "without room for both"])
def test_processes_that_start_at_once_share_the_cache(cache_gb, photos, tmp_path):
    start_server()
    begin = CONTEXT.Barrier(2)
    cfg, folder = settings(photos, *EACH, cache_gb=cache_gb), os.environ["XDG_CACHE_HOME"]
    others = [
        CONTEXT.Process(target=start_with_others, args=(cfg, folder, tmp_path / name, begin))
        for name in ("one.pt", "other.pt")
    ]
    for process in others:
        process.start()
    for process in others:
        process.join(60)
        assert process.exitcode == 0
    shutil.rmtree(cache.cache_folder())
    expected = batches(cfg)
    for name in ("one.pt", "other.pt"):
        assert_same(expected, torch.load(tmp_path / name))


def test_more_packs_than_files_may_be_open_are_read_and_stay(photos, monkeypatch, decoded):
    limits = pytest.importorskip("resource")
    monkeypatch.setattr(pictures, "PACK_BYTES", 1)
    cfg = settings(photos, *EACH)
    expected, written = batches(cfg), packs()
    assert len(written) == 56
    decoded.clear()
    before = limits.getrlimit(limits.RLIMIT_NOFILE)
    few = len(os.listdir("/dev/fd")) + 20
    limits.setrlimit(limits.RLIMIT_NOFILE, (few, before[1]))
    try:
        found = batches(cfg)
    finally:
        limits.setrlimit(limits.RLIMIT_NOFILE, before)
    assert_same(expected, found)
    assert not decoded and packs() == written


def test_packs_that_only_another_user_may_read_stay(photos, monkeypatch, caplog):
    cfg = settings(photos, *EACH)
    expected, written = batches(cfg), packs()
    monkeypatch.setattr(pictures, "open", is_forbidden, raising=False)
    assert_same(expected, batches(replace(cfg, cache_gb=0.0)))
    assert packs() == written and "damaged" not in caplog.text


def test_a_pack_that_another_process_removes_meanwhile_takes_no_room(photos, monkeypatch):
    """Or one that cannot be removed, since another process maps it, on Windows."""
    original = Path.unlink

    def unlink(path, **options):
        if "mapped" in path.name:
            is_forbidden()
        return original(path, **options)

    monkeypatch.setattr(Path, "unlink", unlink)
    folder = cache.cache_folder()
    folder.mkdir(parents=True)
    (folder / "pictures_gone.bin").symlink_to("nowhere")
    for at, name in enumerate(("mapped", "old")):
        (folder / f"pictures_{name}.bin").write_bytes(bytes(20_000))
        os.utime(folder / f"pictures_{name}.bin", (at, at))
    assert cache.make_room(20_000, 6e-5, set())
    assert sorted(path.stem for path in folder.glob("*d.bin")) == [
        "pictures_mapped",
        "pictures_old",
    ]
    assert cache.make_room(20_000, 4e-5, set())
    assert [path.stem for path in folder.glob("*d.bin")] == ["pictures_mapped"]
    assert not cache.make_room(40_000, 4e-5, set())


# -- damage -----------------------------------------------------------------------------------------


def flip_bit(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


DAMAGES = {
    "a bit of the first picture": lambda path: flip_bit(path, 99),
    "a bit of the table": lambda path: flip_bit(path, -99),
    "a bit of the end": lambda path: flip_bit(path, -3),
    "half of it": lambda path: os.truncate(path, path.stat().st_size // 2),
    "its last byte": lambda path: os.truncate(path, path.stat().st_size - 1),
    "all of it": lambda path: os.truncate(path, 0),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "noise": lambda path: path.write_bytes(np.random.default_rng(0).bytes(9_999)),
}


@pytest.mark.parametrize("augment", [[], EACH], ids=["exact", "with a margin"])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_pack_changes_no_pixel_and_is_told(damage, augment, photos, caplog):
    cfg = settings(photos, *augment)
    expected = batches(cfg)
    for path in packs():
        damage(path)
    assert_same(expected, batches(cfg))
    assert "damaged; its pictures" in caplog.text
    told = [line for line in caplog.messages if "damaged; its pictures" in line]
    assert len(set(told)) == len(told), "once a pack"
    caplog.clear()
    assert_same(expected, batches(cfg))
    assert_same(expected, batches(cfg))
    assert "damaged; its pictures" not in caplog.text, "found once"


def test_a_damaged_pack_of_another_user_changes_no_pixel(photos, monkeypatch):
    cfg = settings(photos, *EACH)
    expected = batches(cfg)
    for path in packs():
        flip_bit(path, 99)
    monkeypatch.setattr(Path, "unlink", is_forbidden)
    assert_same(expected, batches(cfg))


def test_pictures_of_another_decoder_or_form_are_not_taken(photos, decoded, monkeypatch):
    cfg = settings(photos)
    batches(cfg)
    for changed in ({"fit": "pad"}, {"channels": 1}, {"decode": "full"}, {"image_size": 25}):
        decoded.clear()
        batches(replace(cfg, **changed))
        assert len(decoded) == 28, changed
    decoded.clear()
    monkeypatch.setattr(pictures, "DECODER", "4_another Pillow")
    batches(cfg)
    assert len(decoded) == 28


# -- copies -----------------------------------------------------------------------------------------


def divide_photographs(folder: Path) -> Path:
    """Photographs of one size in train and test, none with a copy."""
    for number in range(12):
        split, name = ("train", "test")[number % 3 // 2], ("cat", "dog")[number % 2]
        path = folder / split / name / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(number, (400, 300)))
    return folder


def lossless(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        image.save(target.with_suffix(".png"))


def with_comment(source: Path, target: Path) -> None:
    content, exif = source.read_bytes(), Image.Exif()
    exif[0x010E] = "another description"
    block = exif.tobytes()
    head = b"\xff\xd8\xff\xe1" + (len(block) + 2).to_bytes(2) + block
    target.write_bytes(head + content[2:])


def turned_lossless(source: Path, target: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(source) as image:
        turned = image.transpose(Image.Transpose.ROTATE_90)
        turned.save(target.with_suffix(".png"), exif=exif)


def mirrored(source: Path, target: Path, name: str = ".jpg") -> None:
    with Image.open(source) as image:
        image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(target.with_suffix(name))


def in_test(photos: Path, source: Path, write: Callable, name: str) -> bool:
    """Whether an image that is written into test is taken for a copy of one in train."""
    target = photos / "test/cat" / name
    write(source, target)
    train = build_data(settings(photos, "resized_crop"), 0).train
    names = {train.name(index) for index in range(len(train))}
    return str(source) not in names


def test_a_copy_of_a_very_noisy_photograph_is_found(tmp_path):
    photos = divide_photographs(tmp_path / "photos")
    for number in (0, 4, 6):
        source = photos / "train/cat" / f"{number}.jpg"
        noise = np.random.default_rng(number).integers(0, 2, (200, 200))
        Image.fromarray((255 * noise).astype(np.uint8)).save(source)
        assert in_test(photos, source, lossless, f"x{number}.jpg"), number


@pytest.mark.parametrize("write", [lossless, with_comment, turned_lossless])
def test_a_copy_of_a_photograph_that_is_decoded_scaled_is_found(write, tmp_path):
    photos = divide_photographs(tmp_path / "photos")
    for number in (0, 4, 6):
        source = photos / "train/cat" / f"{number}.jpg"
        assert in_test(photos, source, write, f"x{number}.jpg"), number


@pytest.mark.parametrize("suffix", [".jpg", ".png", ".bmp"])
def test_a_photograph_of_the_same_size_and_nearly_the_same_colors_is_no_copy(suffix, tmp_path):
    photos = divide_photographs(tmp_path / "photos")
    source = photos / "train/cat/4.jpg"
    assert not in_test(photos, source, lambda *paths: mirrored(*paths, suffix), "x.jpg")


def test_copies_among_many_photographs_of_one_size_are_looked_for_fast():
    rows = np.zeros(30_000, scan.SCAN)
    rows["height"], rows["width"], rows["scale"], rows["count"] = 1080, 1920, 4, 1
    rows["sums"] = np.random.default_rng(0).uniform(0, 250, (30_000, 1))
    rows["scale"][0], rows["sums"][0], rows["pixels"] = 1, 255, np.arange(30_000)
    began = time.process_time()
    scan.match_scaled(rows, [Path("none.jpg")] * 30_000)
    assert time.process_time() - began < 2
    assert (rows["pixels"] == np.arange(30_000)).all()


# -- decoding at a smaller scale ----------------------------------------------------------------------


def of_train(cfg: DataConfig) -> dict[str, np.ndarray]:
    """The pictures for evaluation of all images, by the name of the file."""
    data = build_data(cfg, 0)
    form = data.preprocessing.form
    return {
        Path(images.name(index)).name: picture.numpy().astype(int)
        for images in data.splits.values()
        for index, picture in enumerate(images.store(form)[0])
    }


def test_scaled_decoding_gives_nearly_the_same_pixels_as_full_decoding(tmp_path):
    photos = divide_photographs(tmp_path / "photos")
    full, small = (of_train(settings(photos, decode=how)) for how in ("full", "scaled"))
    for name, pixels in full.items():
        assert 0 < np.abs(pixels - small[name]).mean() < 2


@pytest.mark.parametrize("how", ["full", "scaled"])
def test_a_checkpoint_sees_pictures_decoded_as_in_its_training(how, photos, train):
    words = [*PHOTOS, f"data.root={photos}", f"data.decode={how}", "data.val_fraction=0.4"]
    assert train(*words, "optim.lr=0.5", "data.augment=[]", "train.epochs=3") == 0
    last = load_checkpoint(Path("checkpoints/last.pth"))
    assert last["preprocessing"]["scaled"] == (how == "scaled")
    assert evaluate.main(["--json", "said.json"]) == 0
    said = json.loads(Path("said.json").read_text())["metrics"]
    assert said["test_log_loss"] == last["test"]["test_log_loss"]
    assert predict.main([str(photos), "--csv", "said.csv"]) == 0
    predicted = {row["image"]: float(row["probability"]) for row in read_rows("said.csv")}
    validated = read_rows("logs/predictions_val.csv")
    assert len(validated) > 6
    for row in validated:  # of six digits, and nine
        assert predicted[row["image"]] == pytest.approx(float(row["probability"]), rel=1e-5)


def read_rows(path: str) -> list[dict[str, str]]:
    with open(path, encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("how", ["full", "scaled"])
def test_a_photograph_that_ends_too_early_is_found_at_the_start(how, photos):
    path = photos / "cat/06.jpg"
    os.truncate(path, path.stat().st_size - 99)
    with pytest.raises(Refused, match=r"06\.jpg: image file is truncated"):
        build_data(settings(photos, decode=how), 0)


TURNS = {  # what undoes each value of EXIF's Orientation, undone
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


@pytest.mark.parametrize("size", [(300, 200), (300, 299)], ids=["oblong", "nearly square"])
@pytest.mark.parametrize("turn", TURNS)
def test_a_photograph_that_lies_on_its_side_comes_upright_at_any_scale(turn, size, tmp_path):
    photos = divide_photographs(tmp_path / "photos")
    image, exif = photograph(77, size), Image.Exif()
    exif[0x0112] = turn
    image.transpose(TURNS[turn]).save(photos / "train/cat/turned.jpg", exif=exif, quality=95)
    image.save(photos / "train/cat/upright.png")
    cfg = settings(photos, on_duplicate="ignore", val_fraction=0.5)
    found = of_train(cfg)
    assert np.abs(found["turned.jpg"] - found["upright.png"]).mean() < 2
    files = build_data(cfg, 0).train.files
    names = [path.name for path in files.paths]
    row = files.scans[names.index("turned.jpg")]
    assert row["scale"] > 1 and (row["width"], row["height"]) == size


FORMS = {
    "gray": (lambda image: image.convert("L"), {}),
    "CMYK": (lambda image: image.convert("CMYK"), {}),
    "progressive": (lambda image: image, {"progressive": True}),
    "all colors": (lambda image: image, {"subsampling": "4:4:4"}),
    "few colors": (lambda image: image, {"subsampling": "4:2:0"}),
}


@pytest.mark.parametrize("convert, options", FORMS.values(), ids=FORMS)
def test_jpegs_of_every_form_are_decoded_at_a_smaller_scale(convert, options, tmp_path):
    photos = divide_photographs(tmp_path / "photos")
    for number in (1, 2, 7):
        image = convert(photograph(70 + number, (401 - number, 299)))
        image.save(photos / f"train/dog/x{number}.jpg", quality=95, **options)
    full, small = (of_train(settings(photos, *EACH, decode=how)) for how in ("full", "scaled"))
    for number in (1, 2, 7):
        assert 0 < np.abs(full[f"x{number}.jpg"] - small[f"x{number}.jpg"]).mean() < 2
