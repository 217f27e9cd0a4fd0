"""Images of more than 8 bits: one range of values for the whole dataset, and the same bytes everywhere."""

import csv
import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import evaluate as evaluate_script
import export as export_script
from cnn.config import DataConfig
from cnn.datasets import images as image_module
from cnn.datasets.build import Data, build_data
from cnn.datasets.decode import open_image, to_array
from cnn.errors import BadImage, Refused
from cnn.inference import load
from cnn.utils.checkpoint import load_checkpoint, save_checkpoint

SETTINGS = ["data.name=folder", "data.args={}", "train.epochs=1", "train.deterministic=true"]


def pictures() -> list[np.ndarray]:
    """Noise of two classes, one brighter than the other, uint8 (12, 12)."""
    rng = np.random.default_rng(0)
    draws = [rng.integers(40 * (i % 2), 216 + 40 * (i % 2), (12, 12)) for i in range(40)]
    return [draw.astype(np.uint8) for draw in draws]


def scaled(bits: int) -> Callable[[np.ndarray], np.ndarray]:
    return lambda pixels: np.rint(pixels * ((2**bits - 1) / 255)).astype(np.uint16)


def as_int16(pixels: np.ndarray) -> np.ndarray:
    return (scaled(16)(pixels).astype(np.int32) - 2**15).astype(np.int16)


def save(values: np.ndarray, path: Path) -> None:
    Image.fromarray(values).save(path)


def png(values: np.ndarray, kind: int) -> bytes:
    """A PNG of 16 bits per channel, which Pillow does not write; kind 2 is RGB."""
    size = struct.pack(">IIBBBBB", values.shape[1], values.shape[0], 16, kind, 0, 0, 0)
    lines = zlib.compress(b"".join(b"\0" + row.astype(">u2").tobytes() for row in values))
    parts = [(b"IHDR", size), (b"IDAT", lines), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )


def save_rgb16(values: np.ndarray, path: Path) -> None:
    path.write_bytes(png(np.repeat(values[:, :, None], 3, axis=2), 2))


STORES: dict[str, tuple[str, Callable[[np.ndarray], np.ndarray], Callable[..., None]]] = {
    "8 bits": ("png", lambda pixels: pixels, save),
    "8 bits in 16": ("png", lambda pixels: pixels.astype(np.uint16), save),
    "10 bits": ("png", scaled(10), save),
    "12 bits": ("png", scaled(12), save),
    "12 bits in a TIFF": ("tif", scaled(12), save),
    "12 bits, big endian": ("tif", lambda pixels: scaled(12)(pixels).astype(">u2"), save),
    "12 bits in int32": ("tif", lambda pixels: scaled(12)(pixels).astype(np.int32), save),
    "14 bits": ("png", scaled(14), save),
    "16 bits": ("png", scaled(16), save),
    "float": ("tif", lambda pixels: (pixels / 255).astype(np.float32), save),
    "float 0 to 255": ("tif", lambda pixels: pixels.astype(np.float32), save),
    "12 bits per color": ("png", scaled(12), save_rgb16),
    "16 bits per color": ("png", scaled(16), save_rgb16),
}


def store(kind: str, root: str = "", change: Callable[[np.ndarray, int], None] | None = None):
    """Writes the pictures into folders of classes and returns the folder."""
    ending, convert, write = STORES[kind]
    for number, pixels in enumerate(pictures()):
        values = convert(pixels)
        if change:
            change(values, number)
        path = Path(root or kind, "ab"[number % 2], f"{number:02}.{ending}")
        path.parent.mkdir(parents=True, exist_ok=True)
        write(values, path)
    return root or kind


def built(root: str, **settings: object) -> Data:
    return build_data(DataConfig("folder", root, **settings), 0)


def said_of(data: Data) -> list[str]:
    return list(data.findings.found)


def losses(name: str = "") -> list[float]:
    with open(Path("logs", name, "history.csv"), encoding="utf-8") as file:
        return [
            float(row[key]) for row in csv.DictReader(file) for key in ("train_loss", "val_loss")
        ]


@pytest.mark.parametrize("kind", STORES)
def test_the_same_pictures_are_the_same_bytes_however_many_bits_they_are_stored_in(kind):
    expected, data = built(store("8 bits")), built(store(kind), channels=1)
    for images, others in ((expected.train, data.train), (expected.val, data.val)):
        assert all(torch.equal(images[i], others[i]) for i in range(len(images)))
        parts = [part.store(part.files.form)[0] for part in (images, others)]
        assert all(map(torch.equal, *parts))
    for key in ("mean", "std"):
        assert getattr(data.preprocessing, key) == getattr(expected.preprocessing, key)


def test_losses_do_not_depend_on_the_bits_and_hardly_on_a_label_that_is_burned_in(train):
    def burn(values: np.ndarray, number: int) -> None:
        values[:3, :4] = 65535 if number == 7 else values[:3, :4]

    def burn_all(values: np.ndarray, number: int) -> None:
        values[:1, :2] = 65535

    store("12 bits", "one label", burn)
    store("10 bits", "labels", burn_all)
    found = {}
    for root in (*map(store, ("8 bits", "12 bits", "float")), "one label", "labels"):
        assert train(*SETTINGS, f"data.root={root}", f"run={root}") == 0
        found[root] = losses(root)
    assert found["12 bits"] == found["float"] == found["8 bits"]
    for root in ("one label", "labels"):
        assert found[root] == pytest.approx(found["8 bits"], abs=0.01)


def test_a_label_in_every_picture_does_not_count_unless_it_is_a_tenth_of_them():
    def burn(values: np.ndarray, number: int) -> None:
        values[:2, :6] = 65535

    assert built(store("12 bits", "labels", burn)).preprocessing.value_range == [0, 4095]


def ct(monkeypatch: pytest.MonkeyPatch) -> str:
    def as_ct(pixels: np.ndarray) -> np.ndarray:
        return scaled(12)(pixels).astype(np.int32) - 1024

    monkeypatch.setitem(STORES, "CT", ("tif", as_ct, save))
    return store("CT")


def test_a_range_that_is_none_of_a_number_of_bits_is_of_the_training_images(monkeypatch):
    data = built(ct(monkeypatch))
    low, high = data.preprocessing.value_range
    assert -1024 <= low < -900 and 2900 < high <= 3071
    assert said_of(data) == [
        f"images of int32: values {low:g} to {high:g} become black to white (data.value_range=[low, high])"
    ]
    raw = np.asarray(Image.open(data.train.name(3)), np.float64)
    shares = (raw.clip(low, high) - low) / (high - low)
    np.testing.assert_array_equal(data.train[3][0], np.rint(255 * shares))
    picture = data.train.picture(3, data.preprocessing.form)
    pixels = np.stack([data.train[i][0].numpy() for i in range(len(data.train))]) / 255
    assert torch.equal(picture, data.train[3])
    assert data.preprocessing.mean == pytest.approx([pixels.mean()], rel=1e-12)
    assert data.preprocessing.std == pytest.approx([pixels.std()], rel=1e-12)


@pytest.mark.parametrize("in_memory", ["true", "false"])
def test_evaluation_prediction_and_export_see_the_pixels_of_the_training(
    train, monkeypatch, in_memory
):
    words = [*SETTINGS, f"data.root={ct(monkeypatch)}", f"data.in_memory={in_memory}"]
    assert train(*words) == 0
    assert evaluate_script.main(["--split", "val", "--json", "val.json"]) == 0
    values = json.loads(Path("val.json").read_text())
    assert values["metrics"]["val_loss"] == losses()[1]
    predict = load("checkpoints/best.pth")
    with open("logs/predictions_val.csv", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            found = predict(row["image"])
            assert found.classes[0] == row["prediction"]
            assert found.probabilities[0] == pytest.approx(float(row["probability"]), abs=1e-6)
    assert export_script.main(["--format", "weights", "--output", "a.pt"]) == 0
    saved = load_checkpoint(Path("checkpoints/best.pth"))["preprocessing"]
    assert torch.load("a.pt")["preprocessing"] == saved and saved["value_range"][0] < -900


def test_a_resumed_run_keeps_its_range(train, monkeypatch):
    words = [*SETTINGS, f"data.root={ct(monkeypatch)}", "data.in_memory=false"]
    assert train(*words, "train.epochs=2", "run=whole") == 0
    assert train(*words) == 0
    path = Path("checkpoints/last.pth")
    saved = load_checkpoint(path)["preprocessing"]
    assert train("--resume", str(path), "train.epochs=2") == 0
    assert load_checkpoint(path)["preprocessing"] == saved
    assert losses() == losses("whole")


def test_a_checkpoint_without_a_range_keeps_the_decoding_of_its_training(train, monkeypatch):
    assert train(*SETTINGS, f"data.root={store('16 bits')}") == 0
    path = Path("checkpoints/last.pth")
    content = load_checkpoint(path)
    old = {**content["preprocessing"]}
    del old["value_range"]
    save_checkpoint(content | {"preprocessing": old}, path)
    predict = load(path)
    values = (np.arange(144, dtype=np.uint16) * 100).reshape(12, 12)
    save(values, Path("a.png"))
    save((values / 65535).astype(np.float32), Path("a.tif"))
    assert predict("a.png") == predict((values >> 8).astype(np.uint8))
    assert predict("a.tif") == predict(np.rint(values / 257).astype(np.uint8))
    assert train("--resume", str(path), "train.epochs=2") == 0
    assert load_checkpoint(path)["preprocessing"] == {**old, "value_range": "per image"}


def test_a_model_of_8_bits_takes_no_floats_and_integers_as_16_bits(train):
    assert train(*SETTINGS, f"data.root={store('8 bits')}") == 0
    predict = load("checkpoints/best.pth")
    assert predict.trained.preprocessing.value_range is None
    picture = pictures()[0]
    save(picture.astype(np.uint16) * 257, Path("a.png"))
    save((picture / 255).astype(np.float32), Path("a.tif"))
    assert predict("a.png") == predict(picture)
    with pytest.raises(BadImage, match="a.tif: float values, and the model was trained on images"):
        predict("a.tif")


@pytest.mark.parametrize(
    "typed", ["[1]", "[5, 5]", "[9, 2]", "[0, .nan]", "[0, .inf]", "[1, 2, 3]"]
)
def test_a_range_that_is_none_is_refused(train, capfd, typed):
    assert train(*SETTINGS, f"data.value_range={typed}") == 2
    said = capfd.readouterr().err
    assert "data.value_range" in said and "expected" in said and "Traceback" not in said


def test_a_typed_range_is_used_where_images_have_more_than_8_bits():
    built(store("12 bits"))
    data = built("12 bits", value_range=[1000, 2000])
    assert data.preprocessing.value_range == [1000, 2000]
    raw = np.asarray(Image.open(data.train.name(0)))
    np.testing.assert_array_equal(data.train[0][0][raw <= 1000], 0)
    np.testing.assert_array_equal(data.train[0][0][raw >= 2000], 255)
    assert torch.equal(data.train.picture(0, data.preprocessing.form), data.train[0])
    (line,) = said_of(data)
    assert "values 1000 to 2000 become black to white" in line
    data = built(store("8 bits"), value_range=[1000, 2000])
    assert data.preprocessing.value_range is None
    for built_data in (data, build_data(DataConfig("digits", value_range=[0, 9]), 0)):
        (line,) = said_of(built_data)
        assert line == "data.value_range is not used; no image file has more than 8 bits"


def test_images_of_8_bits_among_others_are_taken_as_they_are_and_told():
    store("8 bits", "mixed")
    for path in sorted(Path("mixed").glob("*/*.png"))[::2]:
        save(scaled(12)(np.asarray(Image.open(path))), path)
    data, plain = built("mixed"), built(store("8 bits"))
    assert all(torch.equal(data.train[i], plain.train[i]) for i in range(len(data.train)))
    (line,) = said_of(data)
    assert "of uint16: values 0 to 4095" in line and "training images have 8 bits" in line


def test_integers_among_floats_are_refused_without_a_typed_range():
    root = store("float", "mixed")
    store("12 bits", "mixed")
    with pytest.raises(Refused, match=r"no common range \(float32, uint16\)") as caught:
        built(root)
    assert "data.value_range" in str(caught.value)
    assert built(root, value_range=[0, 4095]).preprocessing.value_range == [0, 4095]


def test_a_range_is_told_where_only_the_test_images_need_one():
    store("8 bits", "photos/train")
    store("12 bits", "photos/test")
    data = built("photos")
    (line,) = said_of(data)
    assert "values 0 to 65535" in line and "36 of 36 training images have 8 bits" in line
    assert data.preprocessing.value_range is None
    data = built("photos", value_range=[0, 4095])
    assert torch.equal(data.test[0], data.train[0]) or "values 0 to 4095" in said_of(data)[0]


@pytest.mark.parametrize("kind, channels", [(4, 2), (6, 4)])
def test_transparency_of_16_bits_becomes_white_and_no_bit_of_the_others_is_lost(kind, channels):
    values = np.zeros((4, 5, channels), np.uint16)
    values[..., :-1] = np.arange(20).reshape(4, 5, 1)
    values[:, 1:, -1] = 65535
    Path("a.png").write_bytes(png(values, kind))
    found = to_array(open_image(Path("a.png")), 1, [0, 255])[0]
    assert (found[:, 0] == 255).all() and (found[:, 1:] == values[:, 1:, 0]).all()


@pytest.mark.parametrize("value", [np.uint8(7), np.uint16(700), np.float32(0.1)])
def test_images_that_are_all_alike_are_refused(value):
    for number in range(20):
        path = Path("photos", "ab"[number % 2], f"{number}.tif")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(np.full((6 + number, 6), value), path)
    with pytest.raises(Refused, match="data: all training images are alike"):
        built("photos", on_duplicate="ignore")


def test_a_range_that_makes_all_images_black_is_refused():
    with pytest.raises(
        Refused, match="all training images are alike: one value, or outside data.value_range"
    ):
        built(store("12 bits"), value_range=[50_000, 60_000])


def test_a_color_that_is_everywhere_the_same_is_no_reason_to_refuse():
    for number, pixels in enumerate(pictures()):
        path = Path("photos", "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(np.stack([pixels, np.full_like(pixels, 201), 0 * pixels], axis=2), path)
    assert built("photos").preprocessing.std[1:] == [1.0, 1.0]


def test_files_have_one_or_three_channels():
    with pytest.raises(Refused, match="data.channels: folder has 1, got 2"):
        built(store("8 bits"), channels=2)


def test_sparse_images_keep_what_is_on_them_and_a_label_does_not_count():
    for number in range(20):
        values = np.zeros((20, 20), np.uint16)
        values[3, 4 : 5 + number % 2] = 3_000
        values[:2] = 65_535 * (number == 7)
        path = Path("photos", "ab"[number % 2], f"{number}.png")
        path.parent.mkdir(parents=True, exist_ok=True)
        save(values, path)
    assert built("photos", on_duplicate="ignore").preprocessing.value_range == [0, 4095]


def test_pixels_without_a_value_are_black_and_outside_of_the_range():
    def blank(values: np.ndarray, number: int) -> None:
        values[0, :4] = [np.nan, np.inf, -np.inf, -3.4e38]

    data, plain = built(store("float", change=blank)), built(store("8 bits"))
    assert data.preprocessing.value_range == [0, 1]
    assert data.train[0][0, 0, :4].tolist() == [0, 255, 0, 0]
    assert torch.equal(data.train[0][0, 1:], plain.train[0][0, 1:])


def test_images_that_differ_only_in_their_lower_bits_are_no_copies():
    data = built(store("12 bits", change=lambda values, number: None))
    before = data.train.files.scans["pixels"].copy()
    path = data.train.files.paths[0]
    values = np.asarray(Image.open(path)).copy()
    values[0, 0] ^= 1
    save(values, path)
    after = built("12 bits").train.files.scans["pixels"]
    assert before[0] != after[0] and (before[1:] == after[1:]).all()
    assert (built(store("12 bits in int32")).train.files.scans["pixels"][1:] == after[1:]).all()


# ---------------------------------------------------------------------------------------------
# TIFF files that are more or other than one picture


def tiff(pages: list[dict[int, int]], pixels: bytes = bytes(256)) -> bytes:
    """A TIFF file of pages of 4 x 4 pixels with the given tags, besides the usual ones."""
    content = b"II*\0" + struct.pack("<I", 8 + len(pixels)) + pixels
    for number, tags in enumerate(pages):
        usual = {256: 4, 257: 4, 258: 8, 259: 1, 262: 1, 273: 8, 277: 1, 278: 4, 279: 256}
        entries = sorted((usual | tags).items())
        content += struct.pack("<H", len(entries))
        for tag, value in entries:
            content += struct.pack("<HHII", tag, 4 if tag in (254, 273, 279) else 3, 1, value)
        last = number == len(pages) - 1
        content += struct.pack("<I", 0 if last else len(content) + 4)
    return content


@pytest.mark.parametrize(
    "pages, expected",
    [
        ([{}] * 30, "a TIFF of 30 pages; save each page as a file of its own"),
        ([{277: 5}], "a TIFF of 5 bands"),
        ([{277: 2}], "a TIFF of 2 bands"),
        ([{277: 3}], "a TIFF of 3 bands"),
        ([{277: 4, 262: 2}, {}], "a TIFF of 2 pages"),
        ([{258: 64, 339: 3}], "a TIFF of float64 values"),
        ([{258: 32, 339: 3, 262: 2, 277: 3}], "a TIFF of float32 values in 3 bands"),
        ([{258: 64, 339: 6}], "a TIFF of complex64 values"),
        ([{258: 16, 262: 2, 277: 3, 284: 2}], "a TIFF of 3 bands"),
    ],
)
def test_a_tiff_that_is_not_one_picture_is_named_for_what_it_is(pages, expected):
    Path("a.tif").write_bytes(tiff(pages))
    for file in (Path("a.tif"), io.BytesIO(tiff(pages))):
        with pytest.raises(BadImage, match=expected) as caught:
            to_array(open_image(file), 1)
        assert "values" not in expected or "save it as 8 or 16 bits" in str(caught.value)


@pytest.mark.parametrize(
    "pages", [[{}], [{}, {254: 1}], [{}, {254: 4}], [{}, {256: 2, 257: 2}], [{277: 2, 338: 2}]]
)
def test_previews_masks_and_transparency_are_no_further_pictures(pages):
    Path("a.tif").write_bytes(tiff(pages))
    assert to_array(open_image(Path("a.tif")), 1).shape == (1, 4, 4)


def test_numbers_that_pillow_takes_for_others_are_read_as_they_are():
    Path("a.tif").write_bytes(tiff([{258: 32, 339: 1}], b"\xf0" * 64))
    np.testing.assert_array_equal(to_array(open_image(Path("a.tif")), 1, [0, 2**32 - 1]), 240)
    Path("a.tif").write_bytes(tiff([{258: 8, 339: 2}], b"\xff" * 16))
    np.testing.assert_array_equal(to_array(open_image(Path("a.tif")), 1, [-2, 0]), 128)
    Path("a.tif").write_bytes(tiff([{258: 16, 339: 2}], b"\0\x80" * 16))
    np.testing.assert_array_equal(to_array(open_image(Path("a.tif")), 1, [-(2**15), 2**15 - 1]), 0)


def test_a_picture_that_changes_between_the_two_passes_is_refused(monkeypatch):
    folder, original = store("12 bits"), image_module.scan

    def change(root, paths, *args, **keywords):
        paths[0].write_bytes(paths[1].read_bytes())
        return original(root, paths, *args, **keywords)

    monkeypatch.setattr(image_module, "scan", change)
    with pytest.raises(Refused, match="changed while the run started"):
        built(folder)
