"""predict.py and cnn.inference: odd pictures, lists of them, and the answers that validation gives."""

import csv
import io
import os
import random
import re
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import TINY
from PIL import Image

import predict as script
import train as train_script
from cnn.datasets import preprocessing
from cnn.datasets.preprocessing import fit_image
from cnn.errors import BadImage
from cnn.inference.predictor import Prediction, load
from cnn.utils.checkpoint import load_checkpoint

# ---------------------------------------------------------------------------------------------
# TrainedModel once


def run_of(folder: Path, *words: str) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert train_script.main([*TINY, *words, "train.epochs=3"]) == 0
    return folder / "checkpoints" / "best.pth"


@pytest.fixture(scope="module")
def colour(tmp_path_factory) -> Path:
    """A model of colour pictures."""
    args = "{num_images: 70, num_test: 8, num_classes: 4, image_size: 16, channels: 3}"
    return run_of(tmp_path_factory.mktemp("colour"), f"data.args={args}", "data.augment=[]")


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    """A model of gray pictures that draws: what it says depends on the batch, too."""
    folder = tmp_path_factory.mktemp("digits")
    (folder / "draws_in_validation.py").write_text(
        "from torch import nn\n"
        "class Net(nn.Module):\n"
        "    def __init__(self, num_classes, in_channels):\n"
        "        super().__init__()\n"
        "        self.layer = nn.Linear(in_channels * 64, num_classes)\n"
        "    def forward(self, images):\n"
        "        return self.layer(nn.functional.dropout(images.flatten(1), 0.5, training=True))\n"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [*sys.path, str(folder)])
        words = [
            "model.name=draws_in_validation:Net",
            "model.args={}",
            "checkpoint.monitor=val_acc",
        ]
        return run_of(folder, "data.name=digits", "data.args={}", "data.batch_size=12", *words)


def predicted(checkpoint: Path, *words: str, status: int = 0) -> dict[str, list[str]]:
    """predict.py in this process; of each picture, its row of the table."""
    everything = [*words, "--checkpoint", str(checkpoint), "--csv", "said.csv", "--top", "4"]
    assert script.main(everything) == status
    with open("said.csv", encoding="utf-8", errors="surrogateescape", newline="") as file:
        return {row[0]: row[1:] for row in list(csv.reader(file))[1:]}


# ---------------------------------------------------------------------------------------------
# Odd files

DRAW = np.random.default_rng(3)
RGB = np.asarray(
    Image.fromarray(DRAW.integers(0, 256, (5, 6, 3), dtype=np.uint8)).resize((30, 26))
)  # smooth, and no two corners alike
GRAY = np.asarray(Image.fromarray(RGB).convert("L"))
ALPHA = np.tile(np.linspace(0, 255, 30).astype(np.uint8), (26, 1))


def on_white(pixels: np.ndarray, alpha: np.ndarray) -> np.ndarray:
    picture = Image.merge("RGBA", [*Image.fromarray(pixels).split(), Image.fromarray(alpha)])
    white = Image.new("RGBA", picture.size, "white")
    return np.asarray(Image.alpha_composite(white, picture).convert("RGB"))


def png(depth: int, kind: int, rows: np.ndarray, claims: tuple[int, int] | None = None) -> bytes:
    """A PNG file of a kind that Pillow reads and does not write, as large as it claims or is."""
    width, height = claims or (rows.shape[1], rows.shape[0])
    header = struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0)
    lines = b"".join(b"\0" + row.astype(">u2").tobytes() for row in rows)
    every = [(b"IHDR", header), (b"IDAT", zlib.compress(lines)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in every
    )


def turned(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x112] = number
    return exif


def palette(transparent: bool) -> tuple[Image.Image, np.ndarray]:
    """A picture of 16 colours, and the pixels that a person sees."""
    picture = Image.fromarray(RGB).quantize(16)
    seen = np.asarray(picture.convert("RGB")).copy()
    if transparent:
        seen[np.asarray(picture) == 2] = 255
    return picture, seen


def frames(*arrays: np.ndarray) -> dict:
    return {"save_all": True, "append_images": [Image.fromarray(array) for array in arrays]}


KEYED = np.where((ALPHA < 90)[..., None], np.uint8([7, 8, 9]), RGB)  # one colour is transparent
BACK = {3: (2, False), 5: (1, True), 6: (1, False), 8: (3, False)}  # of EXIF: quarters, mirrored


def save_turned(number: int) -> None:
    """Saved as the camera held it, with the note how to turn it."""
    quarters, mirrored = BACK[number]
    pixels = np.fliplr(np.rot90(RGB, 3)) if mirrored else np.rot90(RGB, quarters)
    Image.fromarray(np.ascontiguousarray(pixels)).save(f"turned{number}.png", exif=turned(number))


# Name: how it is made, and the pixels that a person sees.
GOOD: dict[str, tuple[Callable[[str], object], np.ndarray]] = {
    "rgb.png": (lambda name: Image.fromarray(RGB).save(name), RGB),
    "rgb.bmp": (lambda name: Image.fromarray(RGB).save(name), RGB),
    "rgb.webp": (lambda name: Image.fromarray(RGB).save(name, lossless=True), RGB),
    "rgb.tif": (lambda name: Image.fromarray(RGB).save(name, compression="tiff_lzw"), RGB),
    **{f"turned{number}.png": (lambda name, n=number: save_turned(n), RGB) for number in BACK},
    "broken_exif.png": (
        lambda name: Image.fromarray(RGB).save(name, exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x05\x01\x12"),
        RGB,
    ),
    "gray.png": (lambda name: Image.fromarray(GRAY).save(name), GRAY),
    "gray_alpha.png": (
        lambda name: Image.merge("LA", [Image.fromarray(GRAY), Image.fromarray(ALPHA)]).save(name),
        on_white(np.stack([GRAY] * 3, 2), ALPHA),
    ),
    "rgba.png": (
        lambda name: Image.merge(
            "RGBA", [*Image.fromarray(RGB).split(), Image.fromarray(ALPHA)]
        ).save(name),
        on_white(RGB, ALPHA),
    ),
    "palette.png": (lambda name: palette(False)[0].save(name), palette(False)[1]),
    "palette_transparent.gif": (
        lambda name: palette(True)[0].save(name, transparency=2),
        palette(True)[1],
    ),
    "colour_key.png": (
        lambda name: Image.fromarray(KEYED).save(name, transparency=(7, 8, 9)),
        np.where((KEYED == [7, 8, 9]).all(2)[..., None], np.uint8(255), KEYED),
    ),
    "one_bit.png": (
        lambda name: Image.fromarray(GRAY > 120).save(name),
        np.where(GRAY > 120, np.uint8(255), np.uint8(0)),
    ),
    "gray16.png": (lambda name: Image.fromarray(GRAY.astype(np.uint16) * 257).save(name), GRAY),
    "gray16.tif": (lambda name: Image.fromarray(GRAY.astype(np.uint16) * 257).save(name), GRAY),
    "gray16_big_endian.tif": (
        lambda name: Image.fromarray((GRAY.astype(np.uint16) * 257).astype(">u2")).save(name),
        GRAY,
    ),
    "gray16.pgm": (lambda name: Image.fromarray(GRAY.astype(np.uint16) * 257).save(name), GRAY),
    "rgb16.png": (lambda name: Path(name).write_bytes(png(16, 2, RGB.astype(int) * 257)), RGB),
    "gray32.tif": (lambda name: Image.fromarray(GRAY.astype(np.int32) * 257).save(name), GRAY),
    "cmyk.tif": (
        lambda name: Image.fromarray(RGB).convert("CMYK").save(name),
        np.asarray(Image.fromarray(RGB).convert("CMYK").convert("RGB")),
    ),
    "lab.tif": (
        lambda name: Image.new("LAB", (9, 9), (120, 200, 30)).save(name),
        np.asarray(Image.new("LAB", (9, 9), (120, 200, 30)).convert("RGB")),
    ),
    "animated.gif": (
        lambda name: palette(False)[0].save(name, **frames(GRAY, GRAY)),
        palette(False)[1],
    ),
    "animated.png": (lambda name: Image.fromarray(RGB).save(name, **frames(RGB[::-1])), RGB),
    "animated.webp": (
        lambda name: Image.fromarray(RGB).save(name, lossless=True, **frames(RGB[::-1])),
        RGB,
    ),
    "wrong_extension.jpg": (lambda name: Image.fromarray(RGB).save(name, format="png"), RGB),
    "no_extension": (lambda name: Image.fromarray(RGB).save(name, format="png"), RGB),
    "one_pixel.png": (lambda name: Image.fromarray(RGB[:1, :1]).save(name), RGB[:1, :1]),
    "line.png": (lambda name: Image.fromarray(RGB[:1]).save(name), RGB[:1]),
    "thread.png": (
        lambda name: Image.fromarray(np.repeat(GRAY[:1, :1], 60_000, 0)).save(name),
        GRAY[:1, :1],
    ),
    "huge.png": (
        lambda name: Image.new("1", (8_000, 6_000), 1).save(name),
        np.full((16, 16), 255, np.uint8),
    ),
    "名字 with spaces\nand 🙂.png": (lambda name: Image.fromarray(RGB).save(name), RGB),
}


def jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(RGB).save(buffer, "jpeg")
    return buffer.getvalue()


BAD: dict[str, tuple[Callable[[str], object], str]] = {
    "empty.jpg": (lambda name: Path(name).touch(), "cannot identify image file"),
    "text.jpg": (lambda name: Path(name).write_text("no picture"), "cannot identify image file"),
    "truncated.jpg": (lambda name: Path(name).write_bytes(jpeg()[:-200]), "truncated"),
    "header.jpg": (lambda name: Path(name).write_bytes(jpeg()[:20]), ""),
    "bomb.png": (
        lambda name: Path(name).write_bytes(png(1, 0, np.zeros((1, 1)), (10**6, 10**6))),
        "1000000 x 1000000 pixels",
    ),
    "drawing.png": (lambda name: Image.fromarray(RGB).save(name, format="eps"), "EPS"),
    "float.tif": (
        lambda name: Image.fromarray(GRAY.astype(np.float32)).save(name),
        "float values, and the model was trained on images of 8 bits",
    ),
    "pages.tif": (
        lambda name: Image.fromarray(RGB).save(name, **frames(RGB[::-1])),
        "a TIFF of 2 pages",
    ),
    "folder.jpg": (lambda name: Path(name).mkdir(), "a folder without images"),
    "pipe.jpg": (lambda name: os.mkfifo(name), "neither a file nor a folder"),
    "dangling.jpg": (lambda name: Path(name).symlink_to("nowhere"), "no such file or folder"),
    "missing.jpg": (lambda name: None, "no such file or folder"),
}


def test_odd_files_are_answered_as_a_person_sees_them_or_named(colour, capfd):
    assert len(GOOD) + len(BAD) >= 40
    for name, (make, _) in (GOOD | BAD).items():
        make(name)
    found = predicted(colour, *GOOD, *BAD, status=1)
    said = capfd.readouterr()
    assert found.keys() == GOOD.keys(), "each that can be read has a row, and only these"
    assert "Traceback" not in said.err and "warning" not in said.err.lower(), said.err
    for name, (_, reason) in BAD.items():
        (line,) = [line for line in said.err.splitlines() if line.startswith(f"error: {name}: ")]
        assert reason in line
    assert f"error: {len(BAD)} of {len(GOOD) + len(BAD)} could not be read" in said.err
    assert len(said.out.splitlines()) == 1 + len(GOOD), "a name is on one line, whatever is in it"

    predict = load(colour)
    for name, (_, seen) in GOOD.items():
        expected = predict(Image.fromarray(seen))
        assert found[name][::2] == expected.classes, name
        given = [float(probability) for probability in found[name][1::2]]
        assert given == pytest.approx(expected.probabilities, abs=2e-6), name
    assert len({tuple(row[1::2]) for row in found.values()}) > 8, "they do not all look alike"


def test_a_cmyk_jpeg_has_about_its_colours(colour):
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save("red.jpg", quality=100)
    Image.new("RGB", (20, 20), (255, 0, 0)).save("red.png")
    predict = load(colour)
    assert predict("red.jpg").probabilities == pytest.approx(
        predict("red.png").probabilities, abs=0.02
    )


def test_the_middle_of_a_line_of_pixels_is_cut_out_before_it_is_resized(monkeypatch):
    image = torch.from_numpy(DRAW.integers(0, 256, (1, 4, 9_000), dtype=np.uint8))
    whole = fit_image(image, 64)
    longer = torch.cat([image[..., :1].expand(1, 4, 80_000), image], 2)
    longer = torch.cat([longer, image[..., -1:].expand(1, 4, 80_000)], 2)
    resize, seen = preprocessing.resize, []
    monkeypatch.setattr(
        preprocessing, "resize", lambda image, *a: seen.append(image) or resize(image, *a)
    )
    assert torch.equal(fit_image(longer, 64), whole)
    assert seen[0].shape == (1, 4, 64), "and not 169,000 pixels made 16 times as large"


# ---------------------------------------------------------------------------------------------
# The same answer as validation's


def test_what_validation_said_of_its_images_comes_out(digits, monkeypatch):
    from cnn.config import DataConfig
    from cnn.datasets.build import build_data

    content = load_checkpoint(digits)
    images = build_data(DataConfig(), 0).val
    for number in range(len(images)):
        Image.fromarray(images[number][0].numpy()).save(f"{number:03}.png")
    with open(digits.parents[1] / "logs/predictions_val.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    monkeypatch.setattr(sys, "path", [*sys.path, str(digits.parents[1])])
    words = ["*.png", "model.name=draws_in_validation:Net"]
    found = predicted(digits, *words)
    assert len(found) == len(images) == len(rows) > 4 * 12, "several batches"
    assert [row[0] for row in found.values()] == [row["prediction"] for row in rows]
    probabilities = [float(row["probability"]) for row in rows]
    assert [float(row[1]) for row in found.values()] == pytest.approx(probabilities, rel=1e-5)
    assert content["preprocessing"]["channels"] == 1


def test_a_prediction_is_the_same_each_time_and_draws_from_nobodys_generator(digits, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(digits.parents[1])])
    predict = load(digits, "model.name=draws_in_validation:Net")
    picture = Image.fromarray(GRAY[:8, :8])
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    expected = torch.rand(1), np.random.rand(), random.random()
    torch.manual_seed(1), np.random.seed(1), random.seed(1)
    first = predict(picture)
    load(digits, "model.name=draws_in_validation:Net")
    assert (torch.rand(1), np.random.rand(), random.random()) == expected
    assert predict(picture) == first


# ---------------------------------------------------------------------------------------------
# From Python


def test_paths_pictures_and_arrays_are_predicted_alone_or_in_lists(colour):
    Image.fromarray(RGB).save("a.png")
    predict = load(str(colour), "data.num_workers=2")
    alone = predict("a.png")
    assert isinstance(alone, Prediction) and sum(alone.probabilities) == pytest.approx(1)
    assert sorted(alone.classes) == predict.classes and len(predict.classes) == 4
    save_turned(6)
    with Image.open("a.png") as opened, Image.open("turned6.png") as held_upright:
        same = predict(["a.png", Path("a.png"), Image.fromarray(RGB), opened, held_upright, RGB])
    for said in same:
        assert said.classes == alone.classes
        assert said.probabilities == pytest.approx(alone.probabilities, abs=1e-6)
    assert len(predict("a.png", top=2).classes) == 2 and predict([]) == []


def test_more_pictures_than_a_batch_come_in_their_order(colour):
    pictures = [Image.fromarray(np.roll(RGB, shift, 0)) for shift in range(11)]
    predict = load(colour, "data.batch_size=1")  # batches of 4
    for said, picture in zip(predict(pictures), pictures, strict=True):
        assert said.probabilities == pytest.approx(predict(picture).probabilities, abs=1e-6)


@pytest.mark.parametrize(
    "picture, expected",
    [
        ("nowhere.png", "nowhere.png: the file is gone"),
        (
            np.zeros((4, 4)),
            "picture: got float64 (4, 4); expected a path, bytes of an image file",
        ),
        (Image.new("La", (4, 4)), "conversion from La to L not supported"),
    ],
)
def test_a_picture_that_cannot_be_read_is_raised(colour, picture, expected):
    with pytest.raises(BadImage, match=re.escape(expected)):
        load(colour)([RGB, picture])


# ---------------------------------------------------------------------------------------------
# The command line


def pictures(*names: str) -> None:
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(RGB).save(name)


def test_folders_patterns_and_lists_are_found(colour, monkeypatch):
    pictures("in/b.png", "in/deep/er/a.JPG", "in/.hidden.png", "c[1].png")
    Path("in/notes.txt").touch()
    Path("in/loop").symlink_to(".")
    below = [str(Path("in/b.png")), str(Path("in/deep/er/a.JPG"))]
    assert list(predicted(colour, "in")) == below
    assert list(predicted(colour, "in/**/*.JPG")) == below[1:]
    assert list(predicted(colour, "c[1].png")) == ["c[1].png"], "a name before it is a pattern"
    for listed in (b"in/b.png\r\n\nin/deep\n", b"in/b.png\0in/deep/er/a.JPG\0"):
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(listed)))
        assert list(predicted(colour, "-")) == below


def test_a_name_that_is_no_text_comes_out_as_its_bytes(colour, capfd):
    name = os.fsdecode(b"\xff.png")
    pictures(name)
    assert list(predicted(colour, name)) == [name]
    assert b"\xff.png" in Path("said.csv").read_bytes()
    assert "\\udcff.png" in capfd.readouterr().out


def test_the_table_shows_the_likeliest_first_in_columns(colour, capfd):
    pictures("a.png", "数字.png")
    assert script.main(["a.png", "数字.png", "--top", "2", "--checkpoint", str(colour)]) == 0
    head, first, second = capfd.readouterr().out.splitlines()
    assert head.split() == ["image", "prediction", "then"]
    assert head.index("prediction") == first.index("pattern") == second.index("pattern") + 2
    assert float(first.split()[3]) >= float(first.split()[6])


def test_the_csv_has_as_many_classes_as_asked_for(colour):
    pictures("a.png")
    assert script.main(["a.png", "--top", "2", "--csv", "a.csv", "--checkpoint", str(colour)]) == 0
    head = Path("a.csv").read_text().splitlines()[0]
    assert head == "image,prediction,probability,prediction_2,probability_2"


def refusal(capfd, *words: str) -> str:
    try:
        status = script.main(list(words))
    except SystemExit as ended:
        status = ended.code
    assert status == 2
    return capfd.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize(
    "words, expected",
    [
        ([], "expected files, folders or patterns, or - to read a list from stdin"),
        (["no.png"], "error: no.png: no such file or folder"),
        (["*.jpg"], "error: *.jpg: no file has such a name"),
        (["a.png", "--top", "0"], "--top: expected a whole number of at least 1, got 0"),
        (["a.png", "data.root=b"], "data.root: cannot be changed here, where only device,"),
        (["a.png", "--csv", "no/a.csv"], "--csv: expected a file in a folder that exists"),
        (["a.png", "--checkpoint", "b.pth"], "b.pth: no such file; train first"),
        (["a.png", "--tpo", "1"], "unrecognized arguments: --tpo"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(capfd, words, expected):
    pictures("a.png")
    assert expected in refusal(capfd, *words)


# ---------------------------------------------------------------------------------------------
# Lists from another program


def list_of(monkeypatch, data: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\0"], ids=["LF", "CRLF", "print0"])
def test_a_list_is_read_in_the_encoding_that_its_mark_names(colour, monkeypatch, encoding, end):
    pictures("图/一 二.png", "b.png")
    mark = "\ufeff" if encoding == "utf-16-be" else ""
    blanks = "" if end == "\0" else end + "  " + end
    list_of(monkeypatch, f"{mark}图/一 二.png{end}b.png{end}{blanks}".encode(encoding))
    assert list(predicted(colour, "-")) == ["图/一 二.png", "b.png"]


def test_a_list_of_find_print0_may_name_anything(colour, monkeypatch):
    names = ["a\nb.png", "7", "[x].png", os.fsdecode(b"\xff.png"), " .png"]
    for name in names:
        Path("a.png").unlink(missing_ok=True)
        pictures("a.png")
        os.rename("a.png", name)
    list_of(monkeypatch, b"\0".join(map(os.fsencode, names)) + b"\0")
    assert list(predicted(colour, "-")) == names


def test_a_list_names_files_and_no_patterns(colour, monkeypatch, capfd):
    """A picture removed since must not become another one, whose name its own name matches."""
    pictures("img1.png", "b.png")
    list_of(monkeypatch, b"b.png\nimg[1].png\n")
    assert list(predicted(colour, "-", status=1)) == ["b.png"]
    assert "img[1].png: no such file or folder" in capfd.readouterr().err


def test_what_is_missing_from_a_list_is_named_and_the_rest_is_predicted(colour, monkeypatch, capfd):
    pictures("a.png")
    list_of(monkeypatch, b"".join(b"%d.png\n" % number for number in range(9)) + b"a.png\nz.png\n")
    assert list(predicted(colour, "-", status=1)) == ["a.png"]
    assert "10 of 11 could not be read" in capfd.readouterr().err


def saved(kind: str) -> bytes:
    file = io.BytesIO()
    Image.fromarray(RGB).save(file, kind)
    return file.getvalue()


TABLE_OF_PREDICTIONS = b"image,prediction,probability\nin/b.png,cat,0.9\n"
TEN_MISSING = b"".join(b"%d.png\n" % number for number in range(10))
NO_LISTS = {
    "nothing": (b"", "got none"),
    "blank lines": (b"\r\n \n", "got none"),
    "UTF-16 without a mark": ("in/b.png\n./c.png\n".encode("utf-16-le"), "zero bytes"),
    "the other UTF-16": ("in/b.png\r\n".encode("utf-16-be"), "zero bytes"),
    "UTF-16 without a mark or a line end": ("b.png".encode("utf-16-le"), "zero bytes"),
    "UTF-16 of a pattern": ("*.png".encode("utf-16-le"), "zero bytes"),
    "UTF-16 of Chinese": ("图片\n图像\n".encode("utf-16-le"), "zero bytes"),
    "UTF-32": ("in/b.png\n".encode("utf-32"), "zero bytes"),
    "both kinds of ends": (b"in/b.png\0in/b.png\nc.png\n", "zero bytes"),
    "zeros": (bytes(999), "zero bytes"),
    "half a character of UTF-16": ("in/b.png\n".encode("utf-16")[:-1], "the byte 0x0a"),
    "no UTF-8 after its mark": (b"\xef\xbb\xbfin/b.png\n\xff.png\n", "the byte 0xff"),
    "a table": (
        TABLE_OF_PREDICTIONS,
        "got image,prediction,probability, in/b.png,cat,0.9, which do not",
    ),
    "a JPEG": (saved("jpeg"), "stdin: expected a list"),
    "a PNG": (saved("png"), "stdin: expected a list"),
    "a page": (b"# A title\n\x1b[1m" + b"x" * 900 + b"\n", "\\x1b[1mxxx"),
    "ten that do not exist": (
        TEN_MISSING + b"in/b.png\n",
        "0.png, 1.png, 2.png, ..., which do not",
    ),
    "a root": (b"in/b.png\n/\n", "got /, the root of a file system"),
    "a root twice": (b"//\nin/b.png\n", "the root of a file system"),
    "a root with a dot": (b"/.\0in/b.png\0", "the root of a file system"),
    "a root from below": (b"in/b.png\n/tmp/..\n", "the root of a file system"),
    "a root by a link": (b"in/b.png\nin/link\n", "got in/link, the root of a file system"),
}


@pytest.mark.parametrize("data, expected", NO_LISTS.values(), ids=NO_LISTS)
def test_what_is_no_list_is_refused_before_anything_is_searched(monkeypatch, capfd, data, expected):
    pictures("in/b.png", "c.png", "folder/d.png")
    Path("in/link").symlink_to("/")
    monkeypatch.setattr(os, "walk", lambda *_, **__: pytest.fail("searched"))
    list_of(monkeypatch, data)
    assert script.main(["folder", "-"]) == 2
    (said,) = capfd.readouterr().err.splitlines()
    assert said.startswith("error: stdin: expected a list of files and folders, one per line, got ")
    assert expected in said and said.isprintable() and len(said) < 250


def test_a_typed_root_is_searched(monkeypatch, capfd):
    monkeypatch.setattr(os, "walk", lambda folder, **_: iter([(str(folder), [], [])]))
    assert "/: a folder without images" in refusal(capfd, "/")


def test_an_earlier_table_stays_where_the_model_cannot_be_had(colour, capfd):
    pictures("a.png")
    Path("bad.pth").write_bytes(colour.read_bytes()[:-1])
    earlier = "image,prediction,probability\nb.png,cat,0.5\n"
    Path("a.csv").write_text(earlier)
    assert "bad.pth: damaged" in refusal(
        capfd, "a.png", "--csv", "a.csv", "--checkpoint", "bad.pth"
    )
    assert Path("a.csv").read_text() == earlier


def test_nobody_reading_on_is_no_failure(colour, capfd, monkeypatch):
    pictures("a.png")

    class Closed(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

        def fileno(self) -> int:
            return os.dup(1)

    monkeypatch.setattr(sys, "stdout", Closed())
    with pytest.raises(SystemExit) as ended:
        script.main(["a.png", "--checkpoint", str(colour)])
    assert ended.value.code == 141 and "Traceback" not in capfd.readouterr().err
