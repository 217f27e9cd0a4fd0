"""An image file as pixels: the one way in, for training, validation and prediction."""

import os
import warnings
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from cnn.errors import ADVICE, SCARCITIES, BadImage, DataFailed

VERSION = 2  # counted up when a file decodes to other pixels, so that no cache has those of before
GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
MAX_PIXELS = 120_000_000  # of one image: 360 MB as RGB; more is taken for a decompression bomb
MAX_OF_16_BITS = 2**16 - 1

Image.MAX_IMAGE_PIXELS = None  # our own limit below, an error and not a warning
# Pillow warns of what it can live with, as a broken EXIF block, and names no file.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


# What Pillow's decoders raise on broken files.
BROKEN = (
    *(OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError),
    *(IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError),
)


def open_image(path: str | os.PathLike) -> Image.Image:
    """Reads a whole image file, turned as its EXIF data says; BadImage where it is not one.

    Of an animation or a file of several pages it is the first.
    """
    try:
        with Image.open(path) as image:
            if image.format == "EPS":  # Pillow would have Ghostscript run it, and it is a program
                raise BadImage("an EPS drawing, no photograph")
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()  # decodes all of it; verify() would miss a truncated JPEG
            return upright(image)
    except FileNotFoundError:
        raise BadImage("the file is gone") from None
    except BROKEN as error:
        if getattr(error, "errno", None) in SCARCITIES:  # which says nothing of the image
            raise DataFailed(f"{path}: {_reason(path, error)}; {ADVICE}") from None
        raise BadImage(_reason(path, error)) from None


def _reason(path: str | os.PathLike, error: Exception) -> str:
    """Pillow's words, without the path, which the caller has."""
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.removesuffix(f" {str(path)!r}") or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF data says, if that can be read."""
    try:
        return ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  the picture is whole, only what the camera noted is not
        return image


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """Pixels of a PIL image as uint8 (channels, H, W); what is transparent becomes white.

    Of 16 bits the upper 8 are kept. Values of 32 bits are taken for 16-bit ones, and cut off where
    they are larger; floating-point ones for fractions where all lie in 0..1, else for 0..255.

    Raises:
        BadImage: Pillow has no way from its mode to gray or RGB.
    """
    try:
        if image.mode.startswith("I;16") or image.mode == "I":
            values = np.asarray(image).astype(np.int64).clip(0, MAX_OF_16_BITS)
            image = Image.fromarray((values >> 8).astype(np.uint8))
        elif image.mode == "F":
            image = Image.fromarray(_bytes_of_floats(np.asarray(image)))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, "white")
            image = Image.alpha_composite(white, image)
        if image.mode == "LAB":  # has no way to gray but this
            image = image.convert("RGB")
        image = image.convert("L" if channels == 1 else "RGB")
    except (*BROKEN, ImportError) as error:
        raise BadImage(str(error) or type(error).__name__) from None
    array = np.array(image)  # H, W[, 3]
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _bytes_of_floats(values: np.ndarray) -> np.ndarray:
    values = np.nan_to_num(values, nan=0.0)
    if values.min() >= 0 and values.max() <= 1:
        values = values * 255
    return np.round(values.clip(0, 255)).astype(np.uint8)


def decode(path: Path, channels: int) -> np.ndarray:
    """The file's pixels as uint8 (channels, H, W)."""
    return to_array(open_image(path), channels)
