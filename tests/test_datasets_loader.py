"""Batches: every image once an epoch, in an order and with changes that depend on keys alone."""

import errno
import gc
import itertools
import multiprocessing
import os
import pickle
import time
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from cnn.config import DataConfig
from cnn.config.settings import AugmentationConfig
from cnn.datasets.augment import Augmentation
from cnn.datasets.build import build_data
from cnn.datasets.images import UserImages
from cnn.datasets.loader import Samples, build_loader
from cnn.datasets.order import split_epoch
from cnn.errors import Refused

CPU = torch.device("cpu")
AUGMENT = ["crop", "flip"]
ALL_BUT_CROP = [
    "crop",
    "flip",
    "vflip",
    "rotate",
    "color",
    "erase",
    "trivialaugment",
    "randaugment",
]
ALL = ["resized_crop", *ALL_BUT_CROP]
STREAM, MEMORY = {"in_memory": False}, {"in_memory": True}
BOTH = pytest.mark.parametrize("way", [STREAM, MEMORY], ids=["stream", "memory"])


@pytest.fixture
def data():
    """41 training images in colour."""
    args = {"num_images": 45, "num_test": 9, "image_size": 8, "channels": 3}
    return build_data(DataConfig("synthetic", args=args), 0)


def loader(data, augment=(), part="train", batch_size=8, seed=0, **settings):
    changes = [AugmentationConfig(name) for name in augment]
    cfg = DataConfig(batch_size=batch_size, augment=changes, **settings)
    images, training = getattr(data, part), part == "train"
    return build_loader(cfg, images, data.preprocessing, CPU, seed, training=training)


def pixels(images):
    return torch.stack([images[i] for i in range(len(images))])


def normalized(data, images):
    mean, std = (torch.tensor(getattr(data.preprocessing, name)) for name in ("mean", "std"))
    return (images / 255 - mean.view(-1, 1, 1)) / std.view(-1, 1, 1)


def whole(batches):
    """All images and labels, and the sizes of the batches."""
    images, labels, _ = zip(*batches)
    return torch.cat(images), torch.cat(labels), [len(some) for some in labels]


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A folder of images of many sizes, some gray."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for number, side in enumerate([4, 9, 40, 9, 25, 12] * 4):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (side, side + number) if number < 6 else (side + 5, side, 3)
        Image.fromarray(rng.integers(0, 256, shape, np.uint8)).save(path)
    return tmp_path / "photos"


@pytest.mark.parametrize("batch_size", [2, 3, 8, 64])
def test_an_epochs_batches_leave_no_image_out_and_none_alone(batch_size):
    for number in range(2, 70):
        sizes = split_epoch(number, batch_size)
        assert sum(sizes) == number and min(sizes) > 1 and max(sizes) <= batch_size + 1
        assert len(set(sizes[:-1])) <= 1, "all but the last are of one size"


def test_single_images_are_batches_where_that_is_asked_for():
    assert split_epoch(3, 1) == [1, 1, 1] and split_epoch(1, 8) == [1]


@BOTH
def test_a_last_batch_that_is_not_full_can_be_left_out(way, data):
    dropping = loader(data, drop_last=True, **way)
    assert dropping.sizes == [8] * 5 and len(data.train) == 41
    images, labels, sizes = whole(dropping.train_batches(1))
    assert sizes == [8] * 5
    # The images before are those of an epoch that drops nothing.
    every, their_labels, _ = whole(loader(data, **way).train_batches(1))
    assert images.equal(every[:40]) and labels.equal(their_labels[:40])


def test_no_full_batch_is_refused(train, capfd):
    assert train("data.drop_last=true", "data.batch_size=65") == 2
    assert "data.drop_last: 64 training images are no full batch of 65" in capfd.readouterr().err


@BOTH
def test_an_epoch_has_every_image_once_in_an_order_of_seed_and_epoch(way, data):
    inorder, labels, _ = whole(loader(data, **way).batches())
    assert labels.tolist() == data.train.labels.tolist()
    orders = []
    for seed, epoch in [(0, 1), (0, 1), (0, 2), (1, 1)]:
        images, shuffled, sizes = whole(loader(data, seed=seed, **way).train_batches(epoch))
        assert sizes == [8, 8, 8, 8, 9]
        same = (images[:, None] == inorder).flatten(2).all(2)
        assert same.sum(0).tolist() == same.sum(1).tolist() == [1] * 41, "each image once"
        orders.append(same.int().argmax(1).tolist())
        assert shuffled.equal(labels[orders[-1]]), "with its own label"
    assert orders[0] == orders[1] != sorted(orders[0])
    assert orders[0] != orders[2] and orders[0] != orders[3] and orders[2] != orders[3]


@pytest.mark.parametrize("augment", [[], ALL_BUT_CROP], ids=["plain", "augmented"])
def test_the_batches_are_the_same_from_memory_and_image_by_image(augment, data):
    stream, memory = (whole(loader(data, augment, **w).train_batches(3)) for w in (STREAM, MEMORY))
    assert stream[0].equal(memory[0]) and stream[1].equal(memory[1]) and stream[2] == memory[2]


def leave_in_the_middle(data, kept=[]):  # noqa: B006  it outlives the call
    kept.append(batches := loader(data, in_memory=False, num_workers=1).train_batches(1))
    next(batches)


def test_a_process_that_keeps_its_loader_ends_all_the_same(data):
    """Its workers ignore the SIGTERM with which multiprocessing would end them."""
    process = multiprocessing.get_context("fork").Process(target=leave_in_the_middle, args=(data,))
    process.start()
    process.join(30)
    status = process.exitcode
    process.kill()
    assert status == 0


@pytest.mark.parametrize(
    "augment, way",
    [
        pytest.param(AUGMENT, STREAM, id="stream"),
        pytest.param(ALL, STREAM, id="stream, all changes"),
        pytest.param(AUGMENT, STREAM | {"num_workers": 2}, id="two workers"),
        pytest.param(ALL, STREAM | {"num_workers": 2}, id="two workers, all changes"),
        pytest.param(ALL_BUT_CROP, MEMORY, id="memory"),
    ],
)
def test_an_epoch_entered_at_any_batch_goes_on_bit_for_bit(augment, way, data):
    expected = list(loader(data, augment, **way | {"num_workers": 0}).train_batches(3))
    entered = loader(data, augment, **way)
    for start in (4, 0, 2, 5):
        rest = list(entered.train_batches(3, start))
        assert len(rest) == 5 - start
        for (images, labels, _), (others, their, _) in zip(rest, expected[start:]):
            assert images.equal(others) and labels.equal(their)
        torch.rand(3)  # what else is drawn in between does not matter


@pytest.mark.parametrize(
    "name, way",
    [(name, STREAM) for name in ALL] + [(name, MEMORY) for name in ALL_BUT_CROP],
)
def test_what_is_random_about_an_image_depends_on_seed_epoch_and_image(name, way, data):
    def images(seed, epoch):
        drawn = loader(data, [name], seed=seed, **way)
        return torch.stack([drawn.image((epoch, index)) for index in range(41)])

    first = images(0, 1)
    assert first.shape == (41, 3, 8, 8) and first.dtype == torch.uint8
    assert first.equal(images(0, 1))
    for seed, epoch in [(0, 2), (1, 1)]:
        changed = (first != images(seed, epoch)).flatten(1).any(1).float().mean()
        assert changed > 0.3, "many images are changed in another way"


@BOTH
def test_two_images_of_the_same_pixels_are_changed_differently(way):
    args = {"num_images": 60, "num_classes": 2, "noise": 0}  # only two images are different
    data = build_data(DataConfig("synthetic", args=args, on_duplicate="ignore"), 0)
    train = loader(data, ["crop"], **way)
    assert len({train.image((1, index)).numpy().tobytes() for index in range(20)}) > 4


@pytest.mark.parametrize(
    "augment, way",
    [([], STREAM), (ALL, STREAM), ([], MEMORY), (ALL_BUT_CROP, MEMORY)],
    ids=["stream", "stream, all changes", "memory", "memory, all changes"],
)
def test_a_single_image_is_the_one_of_the_batch(augment, way, data):
    train = loader(data, augment, **way)
    images, labels, _ = list(train.train_batches(2))[4]
    keys = train.keys(2, 4)
    singles = torch.stack([train.image(key) for key in keys])
    torch.testing.assert_close(images.contiguous(), normalized(data, singles))
    for (epoch, index), label in zip(keys, labels.tolist()):
        assert train.raw((epoch, index)).equal(data.train[index])
        assert label == data.train.labels[index]


@BOTH
def test_crop_moves_an_image_by_an_eighth_at_most_and_fills_with_black(way, data):
    train, shifts = loader(data, ["crop"], **way), set()
    for epoch, i in itertools.product((1, 2, 3), range(41)):
        image = data.train[i]
        padded = torch.nn.functional.pad(image, (1, 1, 1, 1))
        parts = padded.unfold(1, 8, 1).unfold(2, 8, 1)  # C, 3, 3, 8, 8
        (found,) = (parts == train.image((epoch, i))[:, None, None]).all(4).all(3).all(0).nonzero()
        shifts.add(tuple(found.tolist()))
    assert len(shifts) == 9, "every place occurs"


@BOTH
def test_flip_turns_about_half_of_the_images_round(way, data):
    train, images = loader(data, ["flip"], **way), pixels(data.train)
    turned = [train.image((1, i)).equal(image.flip(2)) for i, image in enumerate(images)]
    kept = [train.image((1, i)).equal(image) for i, image in enumerate(images)]
    assert kept == [not is_turned for is_turned in turned] and 10 < sum(turned) < 31


@BOTH
def test_erase_makes_a_part_of_some_images_black(way, data):
    train, shares = loader(data, ["erase"], **way), []
    for i, image in enumerate(pixels(data.train)):
        got = train.image((1, i))
        assert (got.eq(image) | got.eq(0)).all()
        shares.append(got.eq(0).all(0).float().mean().item())
    assert 10 < sum(share > 0 for share in shares) < 31 and max(shares) < 0.5


@BOTH
def test_erase_is_a_square_of_half_the_side_wherever_the_images_come_from(way):
    args = {"num_images": 450, "num_test": 9, "image_size": 16, "noise": 0}
    cfg = DataConfig("synthetic", args=args, image_size=16, on_duplicate="ignore")
    data = build_data(cfg, 0)
    train, sides = loader(data, ["erase"], **way), []
    for i in range(len(data.train)):
        black = train.image((1, i))[0].eq(0) & data.train[i][0].ne(0)
        if black.any():
            rows, columns = black.nonzero().T
            sides += [int(where.max() - where.min()) + 1 for where in (rows, columns)]
    assert max(sides) == 8 and sides.count(8) > len(sides) / 3, "but for those over the edge"
    assert 0.4 < len(sides) / 2 / len(data.train) < 0.6


@BOTH
def test_validation_images_come_as_they_are(way, data):
    images, labels, _ = whole(loader(data, AUGMENT, "val", **way).batches())
    assert labels.tolist() == data.val.labels.tolist()
    torch.testing.assert_close(images.contiguous(), normalized(data, pixels(data.val)))


@BOTH
def test_the_training_set_has_mean_0_and_std_1_in_every_channel(way, data):
    images, _, _ = whole(loader(data, **way).train_batches(0))
    torch.testing.assert_close(images.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(images.std((0, 2, 3), correction=0), torch.ones(3))


@pytest.mark.parametrize("channels", [None, 1])
@pytest.mark.parametrize(
    "augment, in_memory",
    [([], True), ([], False), (AUGMENT, True), (["flip", "crop", "rotate"], "auto"), (ALL, False)],
)
def test_images_of_many_sizes_come_in_the_one_that_the_model_gets(
    augment, in_memory, channels, photos
):
    data = build_data(DataConfig("folder", str(photos), image_size=16, channels=channels), 0)
    images, _, _ = whole(loader(data, augment, in_memory=in_memory).train_batches(1))
    assert images.shape == (len(data.train), channels or 3, 16, 16) and images.isfinite().all()
    images, _, _ = whole(loader(data, augment, "val", in_memory=in_memory).batches())
    assert images.shape[1:] == (channels or 3, 16, 16)


def test_images_in_files_are_the_same_from_memory_and_from_the_files(photos):
    data = build_data(DataConfig("folder", str(photos), image_size=16), 0)
    before = sorted(photos.rglob("*"))
    for part in ("train", "val", "test"):
        stream = whole(loader(data, part=part, **STREAM).batches())
        for _ in range(2):  # decoded, then from the cache
            memory = whole(loader(data, part=part, **MEMORY).batches())
            assert memory[0].equal(stream[0]) and memory[1].equal(stream[1])
    assert sorted(photos.rglob("*")) == before, "nothing is written beside the images"


def test_a_full_disk_costs_the_cache_and_not_the_run(photos, tmp_path, monkeypatch):
    data = build_data(DataConfig("folder", str(photos), image_size=16), 0)
    expected = whole(loader(data, **STREAM).batches())

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    images, labels, _ = whole(loader(data, **MEMORY).batches())
    assert images.equal(expected[0]) and labels.equal(expected[1])
    assert not list(tmp_path.rglob("*pixels_*")), "nothing is left on the full disk"


def test_what_a_killed_process_left_in_the_cache_goes_after_a_day(photos, tmp_path):
    folder = tmp_path / "cache" / "cnn"
    folder.mkdir(parents=True, exist_ok=True)
    old, young = folder / ".pictures_a.bin.1.tmp", folder / ".pictures_b.bin.2.tmp"
    for path, hours in ((old, 25), (young, 23)):
        path.touch()
        os.utime(path, (time.time() - 3600 * hours,) * 2)
    data = build_data(DataConfig("folder", str(photos), image_size=16), 0)
    loader(data, **MEMORY)
    assert not old.exists() and young.exists()


def test_what_cannot_be_in_memory_is_refused_only_where_it_is_asked_for(data):
    own = UserImages([(data.train[i], i % 2) for i in range(9)], "own")
    data = replace(data, train=own)
    with pytest.raises(Refused, match=r"data.in_memory: .*your own"):
        loader(data, ["flip"], **MEMORY)
    assert len(loader(data, ["flip"], in_memory="auto")) == 1


def test_an_image_is_resized_by_its_shorter_side_and_cut_in_its_middle(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    stripes = np.zeros((20, 60), np.uint8)
    stripes[:, 20:40] = 255
    for i, name in enumerate(("a/1.png", "a/2.png", "a/3.png", "b/1.png", "b/2.png", "b/3.png")):
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        stripes[0, 0] = i  # no copies
        Image.fromarray(stripes).save(tmp_path / "photos" / name)
    data = build_data(DataConfig("folder", str(tmp_path / "photos"), image_size=10), 0)
    image = loader(data, **STREAM).image((1, 0))
    assert image.shape == (1, 10, 10) and (image[:, :, 1:-1] > 250).all()


def test_a_change_of_the_users_own_is_used_with_the_generators_keyed(data, tmp_path, monkeypatch):
    (tmp_path / "my_change.py").write_text(
        "import random, numpy, torch\n"
        "def noise(image):\n"
        "    value = random.random() + numpy.random.rand() + torch.rand(1)\n"
        "    return image / 255 * value\n"
        "class Dark:\n"
        "    def __call__(self, image):\n"
        "        return image // 2\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    first, second = (whole(loader(data, ["my_change:noise"]).train_batches(1)) for _ in range(2))
    assert first[0].equal(second[0]) and first[0].isfinite().all()
    dark = loader(data, ["my_change:Dark"])
    assert dark.image((1, 5)).equal(data.train[5] // 2)


def test_a_loader_process_may_be_spawned(data):
    changes = Augmentation([AugmentationConfig(name) for name in ALL], data.train, 8, 0)
    samples = Samples(data.train, data.preprocessing.form, changes, 0)
    copied = pickle.loads(pickle.dumps(samples))
    assert copied.image((1, 2)).equal(samples.image((1, 2)))


# -- the balanced sampler ---------------------------------------------------------------------


@pytest.fixture
def skewed(data):
    """61 training images: 40 of class 0, 18 of class 2, 3 of class 3, none of class 1."""
    args = {"num_images": 400, "num_test": 9, "image_size": 8, "channels": 3}
    data = build_data(DataConfig("synthetic", args=args), 0)
    of_class = [np.flatnonzero(data.train.labels == label) for label in range(4)]
    chosen = np.concatenate([of_class[0][:40], of_class[2][:18], of_class[3][:3]])
    return replace(data, train=data.train.subset(np.random.default_rng(0).permutation(chosen)))


BALANCED = {"sampler": "balanced"}


def test_the_balanced_sampler_draws_every_class_equally_often_and_its_images_too(skewed):
    train, epochs = loader(skewed, **BALANCED), 400
    orders = np.stack([train.order(epoch) for epoch in range(1, epochs + 1)])
    assert orders.shape == (epochs, 61) and train.sizes == loader(skewed).sizes
    labels, number = skewed.train.labels, orders.size
    of_class = np.bincount(labels[orders].ravel(), minlength=4) / number
    # Five standard deviations of a share that is drawn so often.
    assert of_class == pytest.approx([1 / 3, 0, 1 / 3, 1 / 3], abs=5 * (2 / 9 / number) ** 0.5)
    of_image, expected = np.bincount(orders.ravel(), minlength=61) / number, 1 / 3
    expected = expected / np.bincount(labels)[labels]
    assert (np.abs(of_image - expected) < 5 * (expected / number) ** 0.5).all()


def test_the_balanced_order_is_a_function_of_seed_and_epoch(skewed):
    def order(seed, epoch):
        return loader(skewed, seed=seed, **BALANCED).order(epoch).tolist()

    assert order(0, 1) == order(0, 1)
    assert len({tuple(order(*key)) for key in [(0, 1), (0, 2), (1, 1)]}) == 3


@pytest.mark.parametrize(
    "augment, way",
    [
        pytest.param([*AUGMENT, "erase"], MEMORY, id="memory"),
        pytest.param(AUGMENT, STREAM, id="stream"),
        pytest.param(AUGMENT, STREAM | {"num_workers": 2}, id="two workers"),
    ],
)
def test_a_balanced_epoch_entered_at_any_batch_goes_on_bit_for_bit(augment, way, skewed):
    expected = list(
        loader(skewed, augment, **BALANCED, **way | {"num_workers": 0}).train_batches(3)
    )
    entered = loader(skewed, augment, **BALANCED, **way)
    for start in (5, 0, 3):
        rest = list(entered.train_batches(3, start))
        assert len(rest) == len(expected) - start
        for (images, labels, _), (others, their, _) in zip(rest, expected[start:]):
            assert images.equal(others) and labels.equal(their)


def test_balanced_batches_are_the_same_from_memory_and_image_by_image(skewed):
    stream, memory = (
        whole(loader(skewed, ALL_BUT_CROP, **BALANCED, **w).train_batches(3))
        for w in (STREAM, MEMORY)
    )
    assert stream[0].equal(memory[0]) and stream[1].equal(memory[1]) and stream[2] == memory[2]
    plain = whole(loader(skewed, **BALANCED, **MEMORY).batches())
    assert plain[1].tolist() == skewed.train.labels.tolist(), "only training is balanced"


@BOTH
def test_an_image_that_comes_again_in_an_epoch_is_changed_in_another_way(way, skewed):
    train = loader(skewed, ["crop"], **BALANCED, **way)
    keys = [key for batch in range(len(train)) for key in train.keys(2, batch)]
    often = max(keys, key=lambda key: [k[1] for k in keys].count(key[1]))[1]
    again = [train.image(key).numpy().tobytes() for key in keys if key[1] == often]
    assert len(again) >= 6 and len(set(again)) > 2
    assert again == [train.image(key).numpy().tobytes() for key in keys if key[1] == often]


@BOTH
def test_a_single_balanced_image_is_the_one_of_the_batch(way, skewed):
    train = loader(skewed, AUGMENT, **BALANCED, **way)
    images, labels, _ = list(train.train_batches(2))[4]
    keys = train.keys(2, 4)
    singles = torch.stack([train.image(key) for key in keys])
    torch.testing.assert_close(images.contiguous(), normalized(skewed, singles))
    assert labels.tolist() == [skewed.train.labels[key[1]] for key in keys]


@BOTH
def test_a_loader_that_is_let_go_of_is_gone_at_once_and_its_processes_with_it(way, skewed):
    # In a circle of references they would live until the garbage collector comes by.
    train = loader(skewed, AUGMENT, num_workers=1, **BALANCED, **way)
    next(train.train_batches(1))
    gone, workers = weakref.ref(train), multiprocessing.active_children()
    assert len(workers) == (way is STREAM)
    gc.disable()
    try:
        del train
        assert gone() is None and not any(worker.is_alive() for worker in workers)
    finally:
        gc.enable()
