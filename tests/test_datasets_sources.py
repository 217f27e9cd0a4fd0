"""Every kind of data: what is read, how it is divided, what is refused and in which words."""

import itertools
import logging
import os
import pwd
import shutil
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_digits

from cnn.config import DataConfig
from cnn.datasets import scan, torchvision_datasets
from cnn.datasets.build import Data, build_data
from cnn.datasets.decode import open_image, to_array
from cnn.datasets.loader import build_loader
from cnn.errors import BadImage, Refused


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """What is learnt of images is remembered in a folder of the test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def photos(tmp_path):
    """Where a test puts its images, beside the cache."""
    return tmp_path / "photos"


def picture(path, number=0, mode="RGB", size=(10, 8)):
    """Writes an image of noise, a function of the number."""
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = size[::-1] if mode == "L" else (*size[::-1], 3)
    noise = np.random.default_rng(number).integers(0, 256, shape, np.uint8)
    Image.fromarray(noise).save(path)


def fill(root, classes=("cat", "dog"), number=10, **options):
    """Writes root/CLASS/000.png and so on."""
    for name in classes:
        for i in range(number):
            picture(
                root / name / f"{i:03}.png",
                zlib.crc32(f"{root.name} {name} {i}".encode()),
                **options,
            )


def folder(root, seed=0, **settings):
    return build_data(DataConfig("folder", str(root), **settings), seed)


def refusal(cfg):
    with pytest.raises(Refused) as caught:
        build_data(cfg, 0)
    return str(caught.value)


def names(images):
    return [images.name(i) for i in range(len(images))]


def numbers(images):
    """Which images of the whole set these are, from their names, such as digits[3]."""
    return [int(name.partition("[")[2].rstrip("]")) for name in names(images)]


def pixels(images):
    return np.stack([np.asarray(images[i]) for i in range(len(images))])


def splits_of(data):
    return {name: names(getattr(data, name)) for name in ("train", "val", "test")}


# ---------------------------------------------------------------------------------------------
# Sets that need no files


def test_digits_are_those_of_scikit_learn_the_first_898_for_training():
    data = build_data(DataConfig("digits"), 0)
    theirs = load_digits()
    assert data.classes == [str(digit) for digit in range(10)]
    assert len(data.train) + len(data.val) == 898 and len(data.test) == 899
    for images in (data.train, data.val, data.test):
        np.testing.assert_array_equal(images.labels, theirs.target[numbers(images)])
        expected = np.round(theirs.images[numbers(images)] * 255 / 16)
        np.testing.assert_array_equal(pixels(images)[:, 0], expected)
    held = sorted([*numbers(data.train), *numbers(data.val)])
    assert held == list(range(898)) and numbers(data.test) == list(range(898, 1797))


def test_what_is_held_out_is_the_same_share_of_every_class():
    data = build_data(DataConfig("digits", val_fraction=0.2), 0)
    held, kept = (np.bincount(images.labels) for images in (data.val, data.train))
    np.testing.assert_array_equal(held, np.round(0.2 * (held + kept)))


def test_synthetic_images_are_the_same_each_time_and_take_keywords():
    args = {"num_images": 30, "num_test": 9, "num_classes": 3, "image_size": 6, "channels": 2}
    first, second = (build_data(DataConfig("synthetic", args=args), 0) for _ in range(2))
    other = build_data(DataConfig("synthetic", args={**args, "seed": 1}), 0)
    np.testing.assert_array_equal(pixels(first.train), pixels(second.train))
    assert (pixels(first.train) != pixels(other.train)).any()
    assert pixels(first.test).shape == (9, 2, 6, 6) and len(first.classes) == 3
    assert "data.args: synthetic" in refusal(DataConfig("synthetic", args={"sizes": 3}))


# ---------------------------------------------------------------------------------------------
# Folders


def test_a_folder_of_class_folders_is_divided_into_three_disjoint_complete_parts(photos):
    fill(photos, ["红 花", "a cat", "Zebra"], 20)
    data = folder(photos, val_fraction=0.25, test_fraction=0.2)
    assert data.classes == ["Zebra", "a cat", "红 花"]
    parts = splits_of(data)
    assert {name: len(part) for name, part in parts.items()} == {"train": 36, "val": 12, "test": 12}
    assert sorted(itertools.chain(*parts.values())) == sorted(map(str, photos.rglob("*.png")))
    for images in (data.train, data.val, data.test):
        of_folders = [Path(name).parent.name for name in names(images)]
        assert of_folders == [data.classes[label] for label in images.labels]
        assert len(set(np.bincount(images.labels))) == 1, "as many of each class"
    assert splits_of(folder(photos, val_fraction=0.25, test_fraction=0.2)) == parts
    assert splits_of(folder(photos, seed=1, val_fraction=0.25, test_fraction=0.2)) != parts


def test_a_folder_of_splits_is_taken_as_it_is_divided(photos):
    for part, number in (("train", 4), ("Validation", 3), ("test", 2)):
        fill(photos / part, number=number)
    (photos / "train" / ".hidden").mkdir()
    (photos / "train" / "cat" / "notes.txt").write_text("no image")
    picture(photos / "train" / "cat" / "deeper" / "X.JPG")
    data = folder(photos)
    parts = splits_of(data)
    assert {name: len(part) for name, part in parts.items()} == {"train": 9, "val": 6, "test": 4}
    assert all(f"{photos}/Validation/" in name for name in parts["val"])
    assert str(photos / "train/cat/deeper/X.JPG") in parts["train"]


def test_two_folders_for_one_split_are_refused(photos):
    for part in ("train", "valid", "validation"):
        fill(photos / part, number=2)
    cfg = DataConfig("folder", str(photos))
    assert (
        "several folders for one split: train (train), valid (val), validation (val); keep one"
        in refusal(cfg)
    )


def test_a_folder_beside_train_that_is_used_for_nothing_is_named(photos, caplog):
    for part in ("train", "val", "tset"):
        fill(photos / part, number=4)
    folder(photos)
    assert "left out: tset/ (" in caplog.text
    caplog.clear()
    (photos / "tset").rename(photos / "test")
    folder(photos)
    assert "left out" not in caplog.text


def test_what_lacks_is_held_out_of_train(photos):
    fill(photos / "train", number=10)
    fill(photos / "val", number=2)
    data = folder(photos, test_fraction=0.2)
    assert (len(data.train), len(data.val), len(data.test)) == (16, 4, 4)


@pytest.mark.parametrize(
    "mode, channels", [("L", None), ("RGB", None), ("L", 3), ("RGB", 1)], ids=str
)
def test_mean_and_std_are_those_of_the_training_pixels(mode, channels, photos):
    fill(photos, number=12, mode=mode)
    data = folder(photos, channels=channels)
    preprocessing = data.preprocessing
    assert preprocessing.channels == (channels or {"L": 1, "RGB": 3}[mode])
    values = (
        np.stack([to_array(open_image(path), preprocessing.channels) for path in names(data.train)])
        / 255
    )
    np.testing.assert_allclose(preprocessing.mean, values.mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(preprocessing.std, values.std((0, 2, 3)), rtol=1e-9)


def test_gray_among_colour_makes_all_colour(photos):
    fill(photos / "train", mode="L")
    fill(photos / "val", ["cat"], mode="L")
    fill(photos / "test", ["dog"], mode="RGB", number=1)
    data = folder(photos)
    assert data.preprocessing.channels == 3 and len(set(data.preprocessing.mean)) == 1
    assert {images[0].shape[0] for images in (data.train, data.val, data.test)} == {3}


@pytest.mark.parametrize("size, side", [((8, 8), 8), ((8, 10), 224)])
def test_the_images_own_size_is_taken_where_they_have_one(size, side, photos):
    fill(photos, size=size)
    assert folder(photos).preprocessing.image_size == side
    assert folder(photos, image_size=7).preprocessing.image_size == 7


def test_a_class_folder_without_images_is_refused(photos):
    fill(photos)
    (photos / "empty").mkdir()
    message = refusal(DataConfig("folder", str(photos)))
    assert f"the class folder has no images: {photos}/empty" in message


def test_a_class_of_val_that_train_has_not_is_refused(photos):
    fill(photos / "train")
    fill(photos / "val", ["cat", "cow"])
    message = refusal(DataConfig("folder", str(photos)))
    assert "val has classes that train has not: cow" in message


@pytest.mark.parametrize("classes, word", [([], "class folders"), (["cat"], "two classes")])
def test_fewer_than_two_classes_are_refused(classes, word, photos):
    photos.mkdir()
    fill(photos, classes)
    assert word in refusal(DataConfig("folder", str(photos)))


def test_a_folder_that_is_not_there_is_refused_with_the_layout(photos):
    message = refusal(DataConfig("folder", str(photos)))
    assert str(photos) in message and "ROOT/CLASS/*.jpg" in message


def test_classes_of_one_image_each_cannot_be_divided(photos):
    fill(photos, number=1)
    assert "too few images to hold test out of 2" in refusal(DataConfig("folder", str(photos)))


def truncated_jpeg(photos):
    """A folder with one file that ends in its middle."""
    fill(photos)
    path = photos / "cat" / "half.jpg"
    picture(path, size=(100, 100))
    path.write_bytes(path.read_bytes()[:2000])
    return path


def test_a_file_that_does_not_decode_is_refused_by_its_path(photos):
    path = truncated_jpeg(photos)
    (photos / "dog" / "text.png").write_text("no image")
    message = refusal(DataConfig("folder", str(photos)))
    assert (
        "2 image files cannot be decoded; repair" in message and "data.on_bad_image=skip" in message
    )
    assert f"  {path}: " in message and "truncated" in message
    assert message.count(str(path)) == 1 and f"  {photos}/dog/text.png: " in message


def test_a_file_that_does_not_decode_is_left_out_where_that_is_asked_for(photos, caplog):
    path = truncated_jpeg(photos)
    whole = splits_of(folder(photos, on_bad_image="skip"))
    assert "1 image file cannot be decoded; left out: " in caplog.text and str(path) in caplog.text
    path.unlink()
    assert splits_of(folder(photos)) == whole


def test_a_split_of_which_nothing_decodes_is_refused_though_it_may_skip(photos):
    fill(photos / "train")
    for name in ("cat", "dog"):
        (photos / "val" / name).mkdir(parents=True)
        (photos / "val" / name / "a.png").write_text("no image")
    cfg = DataConfig("folder", str(photos), on_bad_image="skip")
    assert "no image of val is left" in refusal(cfg)


def test_nothing_is_written_into_the_users_folder(photos, cache):
    fill(photos)
    before = {path: path.stat().st_mtime_ns for path in [photos, *photos.rglob("*")]}
    folder(photos)
    assert {path: path.stat().st_mtime_ns for path in [photos, *photos.rglob("*")]} == before
    assert list(cache.rglob("*.npz"))


@pytest.mark.parametrize("content", [b"", b"broken", None])
def test_a_cache_that_cannot_be_used_hinders_nothing(content, photos, cache):
    fill(photos)
    expected = folder(photos).preprocessing
    if content is None:  # the folder cannot be made
        shutil.rmtree(cache)
        cache.write_text("")
    else:
        next(cache.rglob("*.npz")).write_bytes(content)
    assert folder(photos).preprocessing == expected


def not_allowed(*_, **__):
    raise PermissionError(13, "Permission denied")


@pytest.mark.parametrize(
    "owner, act",
    [(np, "load"), (torch, "from_file"), (os, "utime"), (shutil, "disk_usage")],
)
def test_a_cache_that_is_another_users_hinders_nothing(owner, act, photos, monkeypatch):
    fill(photos)
    images = folder(photos).train
    expected = images.store(images.files.form)[0]
    monkeypatch.setattr(owner, act, not_allowed)
    images = folder(photos).train
    assert all(map(torch.equal, images.store(images.files.form)[0], expected))


def test_without_a_home_nothing_is_remembered_and_nothing_else_happens(photos, monkeypatch):
    """A container's user may have none."""
    fill(photos)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", lambda number: {}[number])
    before = sorted(Path().rglob("*"))
    images = folder(photos).train
    assert {tuple(one.shape) for one in images.store(images.files.form)[0]} == {(224, 224, 3)}
    assert sorted(Path().rglob("*")) == before


def test_file_names_that_are_not_utf8_are_read(photos):
    fill(photos)
    os.rename(photos / "cat" / "000.png", os.fsencode(photos / "cat") + b"/\xd6\xd0.png")
    data = folder(photos)
    assert data.fingerprint()["train"] + len(data.val) + len(data.test) == 20


# ---------------------------------------------------------------------------------------------
# Known sets


def write_mnist(root, labels):
    """MNIST's four files with few images: image i has the value i everywhere."""
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    number = len(labels)
    images = np.repeat(np.arange(number, dtype=np.uint8), 28 * 28)
    header = np.array([0x803, number, 28, 28], ">i4").tobytes()
    for part in ("train", "t10k"):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(header + images.tobytes())
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(
            np.array([0x801, number], ">i4").tobytes() + bytes(labels)
        )
    return raw


def test_mnist_is_read_from_its_files(tmp_path):
    labels = [i % 10 for i in range(40)]
    write_mnist(tmp_path, labels)
    data = build_data(DataConfig("mnist", str(tmp_path)), 0)
    assert pixels(data.test).shape == (40, 1, 28, 28) and data.test.labels.tolist() == labels
    assert pixels(data.test)[:, 0, 9, 9].tolist() == list(range(40))
    assert (len(data.train), len(data.val), len(data.classes)) == (30, 10, 10)


def test_colour_pixels_of_a_known_set_are_kept_as_they_came_without_a_copy():
    array = np.random.default_rng(0).integers(0, 256, (5, 4, 6, 3), np.uint8)
    images = torchvision_datasets._to_images(
        SimpleNamespace(data=array, targets=[0, 1, 0, 1, 2]), "cifar10 train"
    )
    np.testing.assert_array_equal(images[3], array[3].transpose(2, 0, 1))
    assert np.shares_memory(images.pixels.numpy(), array)


def test_a_broken_file_of_a_known_set_is_refused(tmp_path):
    raw = write_mnist(tmp_path, [0, 1] * 20)
    (raw / "train-images-idx3-ubyte").write_bytes(b"broken")
    message = refusal(DataConfig("mnist", str(tmp_path)))
    assert "mnist: cannot read" in message and "train-images-idx3-ubyte" in message


@pytest.mark.parametrize(
    "name, inner, file",
    [
        ("mnist", "MNIST/raw", "t10k-labels-idx1-ubyte"),
        ("fashion_mnist", "FashionMNIST/raw", "train-images-idx3-ubyte"),
        ("cifar10", "cifar-10-batches-py", "data_batch_5"),
        ("cifar100", "cifar-100-python", "meta"),
        ("svhn", "", "test_32x32.mat"),
    ],
)
def test_missing_files_are_refused_with_their_names_the_folder_and_what_to_do(
    name, inner, file, tmp_path
):
    message = refusal(DataConfig(name, str(tmp_path)))
    parts = [file, str(tmp_path / inner), "data.download=true", "data.name=digits"]
    assert all(part in message for part in parts), message
    assert not list(tmp_path.iterdir()), "nothing is made where nothing was asked for"


# ---------------------------------------------------------------------------------------------
# Datasets of the user's own

OWN = """
import numpy as np, torch
from PIL import Image

def pixels(i):
    return np.full((6, 6, 3), i, np.uint8)

KINDS = {
    "pil": lambda i: Image.fromarray(pixels(i)),
    "array": pixels,
    "gray": lambda i: pixels(i)[:, :, 0],
    "tensor": lambda i: torch.from_numpy(pixels(i)).permute(2, 0, 1),
    "float": lambda i: torch.from_numpy(pixels(i)).permute(2, 0, 1) / 255,
    "text": lambda i: torch.zeros(3),
}

def load(root, kind="pil", classes=2):
    return {"train": [(KINDS[kind](i), i % 2) for i in range(20)], "classes": range(classes)}

def nothing(root):
    return []
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module of the user's, in the current folder."""
    (tmp_path / "my_own_data.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    "kind, channels", [("pil", 3), ("array", 3), ("gray", 1), ("tensor", 3), ("float", 3)]
)
def test_a_dataset_of_the_users_own_is_read_whatever_its_images_are(kind, channels, own):
    data = build_data(DataConfig("my_own_data:load", args={"kind": kind}), 0)
    assert (len(data.train), len(data.val), len(data.test)) == (14, 2, 4)
    assert data.classes == ["0", "1"] and data.preprocessing.image_size == 6
    values = numbers(data.train)
    assert (np.array(values) % 2 == data.train.labels).all()
    scale = 255 if data.train[0].is_floating_point() else 1
    assert [round(float(data.train[i].max()) * scale) for i in range(14)] == values
    expected = np.mean(values) / 255, np.std(values) / 255
    assert data.preprocessing.mean == pytest.approx([expected[0]] * channels)
    assert data.preprocessing.std == pytest.approx([expected[1]] * channels)


@pytest.mark.parametrize(
    "name, args, part",
    [
        ("my_own_data:load", {"kind": "text"}, "expected a PIL image, a uint8 array"),
        ("my_own_data:load", {"classes": 1}, "train: expected labels 0 to 0"),
        ("my_own_data:load", {"kinds": 1}, "data.args: my_own_data:load: "),
        ("my_own_data:nothing", {}, "to return a dict with train, classes"),
        ("my_own_data:lode", {}, "data.name: the module my_own_data"),
        ("my_other_data:load", {}, "data.name: expected package.module:name"),
    ],
)
def test_a_dataset_of_the_users_own_that_does_not_fit_is_refused(name, args, part, own):
    assert part in refusal(DataConfig(name, args=args))


def test_images_of_a_dataset_of_the_users_own_stay_as_they_are_when_batches_are_made(own):
    data = build_data(DataConfig("my_own_data:load", args={"kind": "float"}), 0)
    val = build_loader(
        DataConfig(), data.val, data.preprocessing, torch.device("cpu"), 0, training=False
    )
    first, again = (torch.cat([images for images, *_ in val.batches()]) for _ in range(2))
    assert again.equal(first)


def test_a_missing_module_that_the_users_module_imports_is_not_hidden(own, tmp_path):
    (tmp_path / "my_broken_data.py").write_text("import not_installed_anywhere")
    with pytest.raises(ModuleNotFoundError, match="not_installed_anywhere"):
        build_data(DataConfig("my_broken_data:load"), 0)


# ---------------------------------------------------------------------------------------------
# Decoding

QUADRANTS = np.array([[10, 20, 30], [40, 50, 60]], np.uint8)  # 2 x 3, all different


def saved(tmp_path, image, name="a.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def test_an_image_is_turned_as_its_exif_data_says(tmp_path):
    exif = Image.Exif()
    exif[0x112] = 6  # the camera was held upright: to be turned clockwise
    path = saved(tmp_path, Image.fromarray(QUADRANTS), exif=exif)
    np.testing.assert_array_equal(to_array(open_image(path), 1)[0], np.rot90(QUADRANTS, -1))


def test_of_16_bits_the_upper_8_are_kept(tmp_path):
    values = np.array([[0, 255, 256], [32768, 65279, 65535]], np.uint16)
    path = saved(tmp_path, Image.fromarray(values))
    np.testing.assert_array_equal(to_array(open_image(path), 1)[0], [[0, 0, 1], [128, 254, 255]])
    np.testing.assert_array_equal(to_array(open_image(path), 3)[2], [[0, 0, 1], [128, 254, 255]])


@pytest.mark.parametrize("mode, channels", [("RGBA", 3), ("RGBA", 1), ("LA", 1), ("LA", 3)])
def test_what_is_transparent_becomes_white(mode, channels, tmp_path):
    alpha = np.array([[0, 128], [255, 255]], np.uint8)
    bands = [Image.fromarray(np.zeros((2, 2), np.uint8))] * (len(mode) - 1)
    path = saved(tmp_path, Image.merge(mode, [*bands, Image.fromarray(alpha)]))
    for channel in to_array(open_image(path), channels):
        np.testing.assert_array_equal(channel, [[255, 127], [0, 0]])


def test_a_palette_becomes_its_colours_and_what_is_transparent_white(tmp_path):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    path = saved(tmp_path, image)
    np.testing.assert_array_equal(to_array(open_image(path), 3)[:, 0].T, np.eye(3) * 255)
    path = saved(tmp_path, image, transparency=1)
    np.testing.assert_array_equal(to_array(open_image(path), 3)[:, 0, 1], [255, 255, 255])


def test_cmyk_becomes_rgb(tmp_path):
    path = saved(tmp_path, Image.new("CMYK", (4, 4), (0, 255, 255, 0)), "a.jpg", quality=100)
    red, green, blue = to_array(open_image(path), 3)[:, 0, 0].tolist()
    assert red > 250 and green < 5 and blue < 5


@pytest.mark.parametrize(
    "mode", ["1", "L", "RGB", "CMYK", "I;16", "I", "P", "RGBA", "LA", "LAB", "F"]
)
@pytest.mark.parametrize("channels", [1, 3])
def test_every_mode_decodes_to_as_many_bytes_as_asked(mode, channels, tmp_path):
    path = saved(tmp_path, Image.new(mode, (5, 4)), "a.tif")
    decoded = to_array(open_image(path), channels)
    assert decoded.shape == (channels, 4, 5) and decoded.dtype == np.uint8


@pytest.mark.parametrize("content", [b"", b"GIF89a", b"\xff\xd8\xff\xe0", b"text", None])
def test_what_is_no_image_is_told_as_such(content, tmp_path):
    if content is not None:
        (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(BadImage) as caught:
        to_array(open_image(tmp_path / "a.png"), 3)
    assert str(tmp_path) not in str(caught.value) and str(caught.value)


# ---------------------------------------------------------------------------------------------
# Whatever the data


def test_a_limit_takes_so_many_of_the_training_images_and_leaves_the_rest_alone():
    whole = build_data(DataConfig("digits"), 0)
    part = build_data(DataConfig("digits", limit=100), 0)
    other = build_data(DataConfig("digits", limit=100), 1)
    assert len(part.train) == 100 and set(names(part.train)) < set(names(whole.train))
    assert names(part.val) == names(whole.val) and names(part.test) == names(whole.test)
    assert names(other.train) != names(part.train)
    assert names(build_data(DataConfig("digits", limit=10**6), 0).train) == names(whole.train)


def test_a_class_without_images_in_a_split_is_told(photos, caplog):
    fill(photos / "train")
    fill(photos / "val", ["dog"])
    with caplog.at_level(logging.WARNING):
        folder(photos)
    assert "val has no image of: cat" in caplog.text


def test_the_number_of_channels_of_an_array_cannot_be_another():
    cfg = DataConfig("digits", channels=3)
    assert "data.channels: digits has 1, got 3" in refusal(cfg)


def test_the_fingerprint_changes_with_a_label_a_name_and_a_seed_and_with_no_folder(photos):
    fill(photos)
    first = folder(photos)
    fingerprint = first.fingerprint()
    assert [fingerprint[part] for part in ("train", "val", "test")] == [14, 2, 4]
    assert folder(photos, seed=1).fingerprint() != fingerprint
    shutil.move(photos, photos.with_name("moved"))
    assert folder(photos.with_name("moved")).fingerprint() == fingerprint
    first.test.labels[0] = 1 - first.test.labels[0]
    assert first.fingerprint() != fingerprint
    first.test.labels[0] = 1 - first.test.labels[0]
    assert first.fingerprint() == fingerprint
    (photos.with_name("moved") / "cat" / "000.png").rename(
        photos.with_name("moved") / "cat" / "a.png"
    )
    assert folder(photos.with_name("moved")).fingerprint() != fingerprint


@pytest.mark.parametrize("number, classes", [(20, 10), (95, 10), (5, 5), (3, 3), (1, 1)])
def test_the_head_of_the_data_has_images_of_all_classes(number, classes):
    data = build_data(DataConfig("digits"), 0)
    head = data.head(number)
    assert isinstance(head, Data) and head.preprocessing == data.preprocessing
    for part, whole in zip(head.splits.values(), data.splits.values(), strict=True):
        assert len(part) == min(number, len(whole)) and set(names(part)) <= set(names(whole))
        counts = np.bincount(part.labels, minlength=10)
        assert np.count_nonzero(counts) == classes and counts.max() <= -(-number // classes) + 1


def test_the_head_of_sorted_and_skewed_classes_has_the_rare_ones(photos):
    for name, number in (("a", 30), ("b", 4), ("c", 40)):
        fill(photos / "train", [name], number)
        fill(photos / "test", [name], 2)
    head = folder(photos).head(12)
    assert np.bincount(head.train.labels).tolist() == [5, 3, 4]
    assert np.bincount(head.test.labels).tolist() == [2, 2, 2]


def test_few_decoded_images_wait_in_memory_for_a_slow_disk(tmp_path, monkeypatch):
    read = []
    reader = scan._Reader({}, None, [])
    monkeypatch.setattr(reader, "read", lambda path, number: read.append(path) or (path, []))
    monkeypatch.setattr(scan, "CHUNK", 4)
    paths = [tmp_path / f"{number}.png" for number in range(20)]
    for number, (path, _) in enumerate(reader.read_all(paths, np.arange(20))):
        assert path == paths[number] and len(read) <= 4 * (number // 4 + 1)
    assert len(read) == 20
