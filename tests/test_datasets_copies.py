"""Copies of an image are found by their pixels, and none is in the training and in the test."""

import logging
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import evaluate
from cnn.config import DataConfig
from cnn.datasets import digits
from cnn.datasets.build import DATASETS, build_data
from cnn.datasets.images import ArrayImages
from cnn.errors import Refused
from cnn.utils.checkpoint import load_checkpoint, save_checkpoint


@pytest.fixture(autouse=True)
def photos(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "photos"


def fill(folder, number, start=0):
    """Writes so many different images to cat and dog in a folder."""
    for name in ("cat", "dog"):
        (folder / name).mkdir(parents=True, exist_ok=True)
        for i in range(start, start + number):
            noise = np.random.default_rng([i, len(folder.name), name == "cat"]).integers(
                0, 256, (8, 9, 3), np.uint8
            )
            Image.fromarray(noise).save(folder / name / f"{i:02}.png")


def folder(photos, seed=0, **settings):
    return build_data(DataConfig("folder", str(photos), **settings), seed)


def names(images):
    return {images.name(i).rpartition("photos/")[2] for i in range(len(images))}


def again_as_bmp(source, target):
    Image.open(source).save(target, "BMP")


def again_as_palette(source, target):
    """The same colours, 72 of them, out of a palette."""
    Image.open(source).quantize(256, dither=Image.Dither.NONE).save(target, "PNG")


def again_with_metadata(source, target):
    exif = Image.Exif()
    exif[0x010E] = "another description"
    Image.open(source).save(target, "PNG", exif=exif, compress_level=1)


def again_turned(source, target):
    """Stored lying, with the note that it is to be turned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(source).transpose(Image.Transpose.ROTATE_90).save(target, "PNG", exif=exif)


WAYS = {
    "copy": shutil.copy,
    "hard link": os.link,
    "link": os.symlink,
    "bmp": again_as_bmp,
    "palette": again_as_palette,
    "metadata": again_with_metadata,
    "turned": again_turned,
}


@pytest.mark.parametrize("way", WAYS.values(), ids=list(WAYS))
def test_of_copies_in_several_splits_the_one_in_the_test_stays(way, photos, caplog):
    for split, number in (("train", 6), ("validation", 4), ("test", 5)):
        fill(photos / split, number)
    way(photos / "test/cat/00.png", photos / "train/cat/x.png")
    way(photos / "test/dog/01.png", photos / "validation/dog/x.png")
    way(photos / "validation/dog/02.png", photos / "train/dog/x.png")
    way(photos / "validation/dog/02.png", photos / "train/dog/y.png")
    data = folder(photos)
    assert names(data.train) == {f"train/{c}/0{i}.png" for c in ("cat", "dog") for i in range(6)}
    assert len(data.val) == 8 and "validation/dog/x.png" not in names(data.val)
    assert len(data.test) == 10
    assert (
        "3 images in several splits; data.on_duplicate left out 3 of train, 1 of val" in caplog.text
    )
    (details,) = [d for line, d in data.findings.found.items() if "several splits" in line]
    assert [text.count("x.png") for text in details].count(1) == 3
    kept = folder(photos, on_duplicate="keep")
    assert [len(part) for part in (kept.train, kept.val, kept.test)] == [15, 9, 10]
    with pytest.raises(Refused, match="3 images in several splits"):
        folder(photos, on_duplicate="stop")
    caplog.clear()
    assert len(folder(photos, on_duplicate="ignore").train) == 15
    assert "several splits" not in caplog.text


def test_copies_in_one_split_stay_and_are_counted(photos, caplog):
    caplog.set_level(logging.INFO)
    fill(photos / "train", 6)
    fill(photos / "test", 3)
    for i in range(3):
        shutil.copy(photos / "train/cat/00.png", photos / f"train/cat/x{i}.png")
    shutil.copy(photos / "train/dog/00.png", photos / "train/dog/x.png")
    data = folder(photos)
    assert len(data.train) + len(data.val) == 16 and len(data.test) == 6
    assert "2 images with copies in the same split, each of which counts" in caplog.text
    assert "several splits" not in caplog.text
    assert len(folder(photos, on_duplicate="stop").test) == 6


@pytest.mark.parametrize("split", ["train", "test"])
def test_an_image_under_two_classes_is_refused_with_both_places(split, photos, caplog):
    fill(photos / "train", 6)
    fill(photos / "test", 3)
    shutil.copy(photos / f"{split}/cat/00.png", photos / "train/dog/wrong.png")
    for choice in ("drop", "stop"):
        with pytest.raises(Refused) as caught:
            folder(photos, on_duplicate=choice)
        message = str(caught.value)
        assert "1 image under several classes" in message and "data.on_duplicate=keep" in message
        assert f"{split}/cat/00.png (cat, {split})" in message
        assert "train/dog/wrong.png (dog, train)" in message
    assert "train/dog/wrong.png" in names(
        folder(photos, on_duplicate="keep", seed=1).train
    ) | names(folder(photos, on_duplicate="keep", seed=1).val)
    assert "1 image under several classes" in caplog.text


def test_a_split_of_nothing_but_copies_is_refused(photos):
    fill(photos / "test", 3)
    shutil.copytree(photos / "test", photos / "train")
    with pytest.raises(Refused, match="no image of train is left"):
        folder(photos)


def test_images_that_differ_in_one_pixel_are_no_copies(photos, caplog):
    fill(photos, 8)
    image = Image.open(photos / "cat/00.png")
    image.putpixel((0, 0), tuple(255 - value for value in image.getpixel((0, 0))))
    image.save(photos / "cat/near.png")
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(photos / "cat/mirrored.png")
    Image.new("RGB", (4, 6)).save(photos / "cat/black.png")
    Image.new("RGB", (6, 4)).save(photos / "dog/black.png")
    data = folder(photos)
    assert sum(map(len, (data.train, data.val, data.test))) == 20 and "copies" not in caplog.text


@pytest.mark.parametrize("seed", range(4))
def test_what_is_held_out_never_divides_copies(seed, photos):
    fill(photos, 20)
    for name in ("cat", "dog"):
        for i in range(12):
            for n in range(i % 3 + 1):
                shutil.copy(photos / name / f"{i:02}.png", photos / name / f"{i:02}_{n}.png")
    data = folder(photos, seed=seed, val_fraction=0.3, test_fraction=0.3)
    parts = [{name[:6] for name in names(part)} for part in (data.train, data.val, data.test)]
    assert sum(map(len, parts)) == 40, "no image in two of them"
    assert sum(map(len, (data.train, data.val, data.test))) == 40 + 2 * 24
    assert [len(part) for part in parts] == [20, 8, 12], "the shares are those of images"


def test_copies_under_two_classes_that_are_kept_are_held_out_together(photos):
    fill(photos, 10)
    for i in range(10):
        shutil.copy(photos / f"cat/0{i}.png", photos / f"dog/x{i}.png")
    data = folder(photos, on_duplicate="keep", test_fraction=0.4)
    for part in (data.train, data.val, data.test):
        cats = {name[-6:-4] for name in names(part) if name.startswith("cat")}
        assert {name[-5] for name in names(part) if "x" in name} == {cat[-1] for cat in cats}


def test_without_copies_the_division_is_the_one_of_earlier_versions(photos):
    fill(photos, 20)
    for seed in range(3):
        now, before = folder(photos, seed), folder(photos, seed, on_duplicate="ignore")
        assert names(now.test) == names(before.test) and names(now.val) == names(before.val)


def test_copies_in_a_known_dataset_are_told_and_stay(monkeypatch, caplog):
    assert build_data(DataConfig("digits"), 0) and not caplog.text, "no copies among the digits"
    splits, classes = digits.load()
    train, test = (np.stack([images[i] for i in range(len(images))]) for images in splits.values())
    test[:10] = train[:10]
    splits = {
        split: ArrayImages(pixels, splits[split].labels, split)
        for split, pixels in (("train", train), ("test", test))
    }
    monkeypatch.setitem(DATASETS, "digits", lambda *_: (splits, classes))
    data = build_data(DataConfig("digits"), 0)
    assert len(data.train) + len(data.val) == 898 and len(data.test) == 899
    assert "10 images in several splits" in caplog.text


def test_a_checkpoint_of_a_version_that_knew_no_copies_goes_on(photos, train, capfd):
    """Its data are read as that version read them, in an evaluation too."""
    fill(photos / "train", 20)
    fill(photos / "test", 5)
    shutil.copy(photos / "test/cat/00.png", photos / "train/cat/x.png")
    words = ("data.name=folder", f"data.root={photos}", "data.args={}", "data.image_size=8")
    assert train(*words, "data.on_duplicate=ignore", "train.epochs=1") == 0
    for path in (Path("checkpoints/last.pth"), Path("checkpoints/best.pth")):
        content = load_checkpoint(path)
        del content["data"]["content"], content["config"]["data"]["on_duplicate"]
        save_checkpoint(content, path)
    for epochs in (2, 3):
        assert train("--resume", f"train.epochs={epochs}") == 0
    assert "  train     37  " in capfd.readouterr().err
    assert evaluate.main([]) == 0
    assert "other data" not in capfd.readouterr().err
