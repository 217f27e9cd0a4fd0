"""Augmentation: what each change does to a batch, by its arguments and its random numbers alone."""

import itertools
import math
from pathlib import Path

import numpy as np
import pytest
import torch

from cnn.config import load_config
from cnn.config.settings import AugmentationConfig
from cnn.datasets.augment import (
    AUGMENTATIONS,
    Augmentation,
    color,
    crop,
    erase,
    flip,
    resized_crop,
    rotate,
)
from cnn.errors import DataFailed, Refused

BATCH = {name: draws for name, (_, draws) in AUGMENTATIONS.items() if draws}
SAME_SIZE = [name for name in AUGMENTATIONS if name != "resized_crop"]
CPU = torch.device("cpu")


def pictures(number=6, size=16, channels=3, dtype=torch.uint8):
    """Random images, N, S, S, C."""
    shape = (number, size, size, channels)
    images = torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(0))
    return images.to(torch.uint8) if dtype == torch.uint8 else images / 255


def draws(number, columns, seed=0):
    return torch.rand(number, columns, generator=torch.Generator().manual_seed(seed))


class Pictures:
    """A split of images: how many, and their names."""

    def __len__(self):
        return 6

    def name(self, index):
        return f"picture {index}"


def augmentation(text, size=16, seed=0):
    changes = load_config(None, [f"data.augment={text}"])[0].data.augment
    return Augmentation(changes, Pictures(), size, seed)


def augmented(text, images, epoch=1, seed=0):
    """The images (N, S, S, C) after what the setting says."""
    keys = [(epoch, index) for index in range(len(images))]
    changes = augmentation(text, images.shape[1], seed)
    return changes.gather(images, torch.arange(len(images)), slice(0, len(images)), keys)


def planes(images):
    return images.permute(0, 3, 1, 2)


# -- what each does ---------------------------------------------------------------------------


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("padding", [None, 1, 5, 20])
def test_crop_moves_each_image_as_its_numbers_say_and_fills_with_black(padding, channels):
    images, drawn = pictures(50, 16, channels), draws(50, 2)
    most = 2 if padding is None else padding
    padded = torch.nn.functional.pad(images, (0, 0, most, most, most, most))
    corners = (drawn * (2 * most + 1)).long().tolist()
    expected = [image[y : y + 16, x : x + 16] for image, (y, x) in zip(padded, corners)]
    assert crop(images, drawn, padding).equal(torch.stack(expected))


@pytest.mark.parametrize("axis", [1, 2])
@pytest.mark.parametrize("probability", [0.0, 0.5, 0.9, 1.0])
def test_flip_turns_the_images_whose_number_is_below_the_probability(probability, axis):
    images, drawn = pictures(200, 4), draws(200, 1)
    got = flip(images, drawn, probability, axis)
    turned = [image.equal(before.flip(axis - 1)) for image, before in zip(got, images)]
    assert turned == (drawn[:, 0] < probability).tolist()
    assert all(t or image.equal(before) for t, image, before in zip(turned, got, images))


def test_vflip_turns_upside_down_and_flip_left_to_right():
    images = pictures()
    for name, axis in (("flip", 2), ("vflip", 1)):
        turned = augmented(f"[{{name: {name}, probability: 1}}]", images)
        assert turned.equal(planes(images.flip(axis)))


@pytest.mark.parametrize("side, probability", [(0.5, 0.5), (0.25, 1.0)])
def test_erase_makes_a_square_black_around_the_center_drawn(side, probability):
    images, drawn = pictures(40).clamp(min=1), draws(40, 3)
    got = erase(images, drawn, probability, side)
    centers = torch.arange(16) + 0.5
    for image, before, (first, y, x) in zip(got, images, drawn.tolist()):
        near = [(centers - at * 16).abs() < 8 * side for at in (y, x)]
        black = near[0][:, None] & near[1] & (first < probability)
        assert image.eq(0).all(2).equal(black) and image[~black].equal(before[~black])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("most", [(0.4, 0, 0), (0, 0.9, 0), (0, 0, 0.7), (2.5, 0.5, 0.5)])
def test_color_is_torchvisions_with_the_same_factors(most, channels, dtype):
    from torchvision.transforms.v2 import functional

    images, drawn = pictures(20, 16, channels, dtype), draws(20, 3)
    got = planes(color(images, drawn, *most))
    adjust = [functional.adjust_brightness, functional.adjust_contrast]
    adjust += [functional.adjust_saturation] * (channels == 3)
    expected = []
    for image, row in zip(planes(images), drawn.tolist()):
        for change, draw, share in zip(adjust, row, most):
            low = max(0, 1 - share)
            image = change(image, low + draw * (1 + share - low))
        expected.append(image)
    level = 1 if dtype == torch.uint8 else 1 / 255
    assert (got.double() - torch.stack(expected).double()).abs().max() <= level
    assert got.dtype == dtype and not got.equal(planes(images)) or channels == 1 and most[2] == 0.7


def test_color_without_a_change_changes_nothing():
    for dtype, channels in itertools.product((torch.uint8, torch.float32), (1, 3)):
        images = pictures(9, 16, channels, dtype)
        assert color(images, draws(9, 3), 0, 0, 0).equal(images)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("degrees", [10, 45, 180])
def test_rotate_is_torchvisions_with_the_same_angle(degrees, channels):
    from torchvision.transforms.v2 import InterpolationMode, functional

    smooth = torch.nn.functional.interpolate(planes(pictures(10, 4, channels)).float(), (32, 32))
    images = smooth.to(torch.uint8).permute(0, 2, 3, 1).contiguous()
    drawn = draws(10, 1)
    got = planes(rotate(images, drawn, degrees))
    angles = ((2 * drawn[:, 0] - 1) * degrees).tolist()

    def theirs(sign):
        return torch.stack(
            [
                functional.rotate(image, sign * angle, InterpolationMode.BILINEAR)
                for image, angle in zip(planes(images), angles)
            ]
        )

    def difference(images):
        return (got.double() - images.double()).abs().mean().item()

    assert difference(theirs(1)) < 1 and difference(theirs(-1)) > 10
    assert rotate(images, drawn, 0).equal(images)


@pytest.mark.parametrize("height, width", [(40, 60), (60, 40), (7, 90), (3, 3)])
@pytest.mark.parametrize("scale, ratio", [((0.1, 0.4), (0.5, 2)), ((1, 1), (1, 1))])
def test_resized_crop_takes_a_box_of_the_area_and_shape_drawn(scale, ratio, height, width):
    """Rows and columns are told from the values: a ramp that says where a pixel comes from."""
    ramp = torch.stack(
        torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    ).double()
    for row in draws(50, 4):
        got = resized_crop(ramp, row, 64, scale, ratio)
        assert got.shape == (2, 64, 64)
        area = (scale[0] + row[0].item() * (scale[1] - scale[0])) * height * width
        shape = math.exp(math.log(ratio[0]) + row[1].item() * math.log(ratio[1] / ratio[0]))
        sides = (area / shape) ** 0.5, (area * shape) ** 0.5
        for at, (side, wanted) in enumerate(zip((height, width), sides)):
            length = min(side, max(1, round(wanted)))
            start = int(row[2 + at].item() * (side - length + 1))
            low, high = got[at].min().item(), got[at].max().item()
            assert start - 1e-6 <= low <= high <= start + length - 1 + 1e-6
            if length <= 64:  # made larger, not smaller
                assert (low, high) == pytest.approx((start, start + length - 1))


def test_resized_crop_of_a_box_in_the_size_asked_for_keeps_its_pixels():
    image = planes(pictures(1, 20))[0]
    row = torch.tensor([0.0, 0.5, 0.999, 0.0])
    assert resized_crop(image, row, 10, (0.25, 0.3), (1, 1)).equal(image[:, 10:, :10])


def test_every_place_of_the_box_is_as_likely():
    image = torch.arange(3.0).repeat(3, 1)[None]
    lefts = [resized_crop(image, row, 1, (1 / 9, 1 / 9), (1, 1)).item() for row in draws(3000, 4)]
    counts = np.bincount(np.round(lefts).astype(int))
    assert len(counts) == 3 and (abs(counts - 1000) < 150).all()


# -- in a batch -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32])
@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_an_image_is_the_same_in_every_batch(name, channels, dtype):
    changes = augmentation(f"[{name}]")
    images = planes(pictures(6, 40 if name == "resized_crop" else 16, channels, dtype))
    keys = [(1, index) for index in range(6)]
    resized = [changes.resize(image, key) for image, key in zip(images, keys)]
    batch = changes.stack(resized, keys)
    assert batch.shape == (6, channels, 16, 16) and batch.dtype == dtype
    assert batch.is_contiguous(memory_format=torch.channels_last)
    for several in ([4], [5, 1], [3, 2, 0, 4, 1]):
        alone = changes.stack([resized[i] for i in several], [keys[i] for i in several])
        assert alone.equal(batch[several])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["color", "rotate"])
def test_an_image_is_the_same_in_a_batch_of_any_size_and_by_any_threads(name, channels):
    function, columns = AUGMENTATIONS[name]
    images, drawn = pictures(33, 48, channels, torch.float32), draws(33, columns)
    batch, threads = function(images, drawn), torch.get_num_threads()
    assert all(function(images[i : i + 1], drawn[i : i + 1])[0].equal(batch[i]) for i in range(33))
    torch.set_num_threads(2)
    try:
        assert function(images, drawn).equal(batch)
    finally:
        torch.set_num_threads(threads)


def test_the_images_given_stay_as_they_are():
    images = pictures()
    before = images.clone()
    changed = augmented(f"[{', '.join(SAME_SIZE)}]", images)
    assert images.equal(before) and not changed.equal(planes(before))


def test_an_evaluation_changes_nothing():
    changes, image = augmentation("[resized_crop, flip, color]"), planes(pictures(1, 32))[0]
    small = image[:, :16, :16]
    assert changes.resize(small, (0, 0)).equal(small)
    assert changes.stack([small], [(0, 0)])[0].equal(small)
    assert changes.needs_margin(1) and not changes.needs_margin(0)
    assert changes.resize(image, (1, 0)).shape == (3, 16, 16)


def test_changes_come_in_the_order_of_the_list():
    images = pictures()
    dark = "{name: erase, probability: 1, side: 0.4}"
    for first, second in itertools.permutations(["crop", "rotate", dark], 2):
        once = augmented(f"[{first}]", images).permute(0, 2, 3, 1).contiguous()
        assert augmented(f"[{first}, {second}]", images).equal(augmented(f"[{second}]", once))
        other = augmented(f"[{second}, {first}]", images)
        assert not augmented(f"[{first}, {second}]", images).equal(other)


def test_resized_crop_comes_first_wherever_it_is_listed():
    image = planes(pictures(1, 40))[0]
    for text in ("[resized_crop, crop]", "[crop, resized_crop]"):
        changes = augmentation(text)
        resized = changes.resize(image, (1, 2))
        assert resized.equal(augmentation("[resized_crop]").resize(image, (1, 2)))
        stacked = changes.stack([resized], [(1, 2)])
        assert stacked.equal(augmentation("[crop]").stack([resized], [(1, 2)]))


def test_images_of_several_dtypes_in_a_batch_are_no_silent_mixture():
    changes = augmentation("[]")
    images = [torch.zeros(3, 16, 16, dtype=dtype) for dtype in (torch.uint8, torch.float32)]
    with pytest.raises(DataFailed, match="one dtype"):
        changes.stack(images, [(1, 0), (1, 1)])


# -- the random numbers -----------------------------------------------------------------------


def test_a_change_draws_the_same_whatever_stands_beside_it():
    images = pictures()
    for name in SAME_SIZE:
        alone = augmented(f"[{name}]", images)
        still = "{name: color, brightness: 0, contrast: 0, saturation: 0}"
        never = "{name: flip, probability: 0}"
        for beside in (f"[{name}, {never}]", f"[{never}, {name}]", f"[{still}, {name}]"):
            if name not in ("color", "flip"):
                assert augmented(beside, images).equal(alone), beside
        assert not augmented(f"[{name}]", images, epoch=2).equal(alone)
        assert not augmented(f"[{name}]", images, seed=1).equal(alone)


def test_a_change_that_is_listed_twice_draws_other_numbers_the_second_time():
    images = pictures()
    for name in ("crop", "rotate", "randaugment"):
        once = augmented(f"[{name}]", images).permute(0, 2, 3, 1).contiguous()
        twice = augmented(f"[{name}, {name}]", images)
        assert not twice.equal(augmented(f"[{name}]", once))
        assert twice.equal(augmented(f"[{name}, {name}]", images))


def test_the_numbers_are_those_of_a_philox_generator_by_seed_epoch_and_name():
    """What a run of the last version drew for crop, flip and erase is drawn still."""
    images = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(6, 1, 1, 1)
    moved = augmented("[crop, flip, erase]", images, epoch=3, seed=7)
    sums = moved.int().flatten(1).sum(1).tolist()
    assert sums == [30240, 30240, 23310, 26109, 25075, 30030]


# -- arguments --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        "{name: crop, padding: 1}",
        "{name: flip, probability: 0.1}",
        "{name: vflip, probability: 0.1}",
        "{name: rotate, degrees: 90}",
        "{name: color, brightness: 0.9}",
        "{name: color, contrast: 0.9}",
        "{name: color, saturation: 0.9}",
        "{name: erase, probability: 0.9}",
        "{name: erase, side: 0.2}",
        "{name: randaugment, num_ops: 5}",
        "{name: randaugment, magnitude: 30}",
    ],
)
def test_an_argument_changes_what_is_done(text):
    images, name = pictures(), text.partition(",")[0].removeprefix("{name: ")
    assert not augmented(f"[{text}]", images).equal(augmented(f"[{name}]", images))


@pytest.mark.parametrize("argument", ["scale: [0.01, 0.02]", "ratio: [5, 6]"])
def test_an_argument_of_resized_crop_changes_the_box(argument):
    image = planes(pictures(1, 40))[0]
    boxes = [
        augmentation(f"[{text}]").resize(image, (1, 2))
        for text in ("resized_crop", f"{{name: resized_crop, {argument}}}")
    ]
    assert not boxes[0].equal(boxes[1])


OWN = """
import torch
def lighter(image, by=1): return image + by
class Filled:
    def __init__(self, value): self.value = value
    def __call__(self, image): return torch.full_like(image, self.value)
def failing(image): raise KeyError("no such thing")
def mixed(image): return image if image.sum() % 2 else image / 255
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_changes.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)


def test_changes_of_the_users_own_take_arguments(own):
    images = pictures()
    lighter = augmented("[{name: 'own_changes:lighter', args: {by: 3}}]", images)
    assert lighter.equal(planes(images + 3))
    assert augmented("['own_changes:lighter']", images).equal(planes(images + 1))
    assert augmented("[{name: 'own_changes:Filled', args: {value: 9}}]", images).eq(9).all()


@pytest.mark.parametrize(
    "text, words",
    [
        ("{name: 'own_changes:lighter', args: {bye: 3}}", "bye"),
        ("{name: 'own_changes:Filled', args: {size: 3}}", "size"),
        ("'own_changes:Filled'", "value"),
        ("'own_changes:missing'", "missing"),
    ],
)
def test_a_wrong_keyword_is_refused_in_one_line_before_anything_is_loaded(text, words, own):
    with pytest.raises(Refused, match=words) as refused:
        augmentation(f"[{text}]")
    message = str(refused.value)
    assert message.startswith("data.augment: ") and "own_changes" in message
    assert "\n" not in message


def test_an_error_in_a_change_of_the_users_own_names_the_image_and_the_line(own):
    with pytest.raises(DataFailed, match=r"picture 0: KeyError: .*no such thing.*own_changes.py:7"):
        augmented("[flip, 'own_changes:failing']", pictures())
    with pytest.raises(DataFailed, match="one dtype"):
        augmented("['own_changes:mixed']", pictures(30))


REFUSED = {
    "of another": ("{name: flip, padding: 2}", "[0].padding: is for crop, not for flip"),
    "of several": ("{name: crop, probability: 1}", "[0].probability: is for flip, vflip, erase,"),
    "args for ours": ("{name: crop, args: {a: 1}}", "[0].args: is for your own, not for crop"),
    "ours for the user's": (
        "{name: 'a:b', scale: [0.1, 1]}",
        "[0].scale: is for resized_crop, not",
    ),
    "bounds": ("{name: resized_crop, ratio: [2, 1]}", "[0].ratio: expected the smallest and"),
    "one bound": ("{name: resized_crop, ratio: [2]}", "[0].ratio: expected the smallest and"),
    "twice": (
        "resized_crop, {name: resized_crop, scale: [0.1, 1]}",
        "[1]: resized_crop is done first",
    ),
    "beyond": ("{name: rotate, degrees: 181}", "[0].degrees: expected a number of at least 0 and"),
    "share": ("{name: flip, probability: 50}", "[0].probability: expected a number of at least 0"),
    "nothing": ("{name: erase, side: 0}", "[0].side: expected a number above 0 and at most 1"),
    "too many": ("{name: randaugment, magnitude: 31}", "[0].magnitude: expected a whole number"),
    "part": ("{name: crop, padding: 2.5}", "[0].padding: expected a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_that_does_not_fit_is_refused_with_its_place(case):
    text, message = REFUSED[case]
    with pytest.raises(Refused) as refused:
        load_config(None, [f"data.augment=[{text}]"])
    assert f"data.augment{message}" in str(refused.value)


def test_only_arguments_that_were_given_are_handed_on():
    assert AugmentationConfig("flip").arguments() == {}
    changes = AugmentationConfig("color", brightness=0.4, saturation=0)
    assert changes.arguments() == {"brightness": 0.4, "saturation": 0}


def test_a_change_of_ones_own_that_cannot_be_is_told_before_a_file_is_read(train, capfd):
    (Path("photos") / "a").mkdir(parents=True)  # without an image, which would be told, too
    words = ["data.name=folder", "data.root=photos", "data.augment=[nowhere:change]"]
    assert train(*words) == 2
    said = capfd.readouterr().err
    assert "data.augment" in said and "nowhere" in said and "image" not in said
