"""Decoding of image files to pixels, the same for training, validation and prediction."""

import os
import warnings
from pathlib import Path
from typing import IO

import numpy as np
import PIL
from PIL import Image, ImageOps

from cnn.datasets.image_files import add_heif
from cnn.errors import ADVICE, SCARCITIES, BadImage, DataFailed

VERSION = 2  # incremented when files decode to other pixels, so that old caches are not used
DECODER = f"{VERSION}_{PIL.__version__}"  # what the pixels of a file depend on, besides its bytes
GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
MAX_PIXELS = 120_000_000  # per image: 360 MB as RGB; a larger image can be a decompression bomb
MAX_OF_16_BITS = 2**16 - 1

# The errors of Pillow's decoders on broken files.
DATA_ERRORS = (SyntaxError, ValueError, TypeError, LookupError, ArithmeticError)
BROKEN = (OSError, EOFError, MemoryError, Image.DecompressionBombError, *DATA_ERRORS)


def silence_pillow() -> None:
    """Silences the warnings of Pillow in this process.

    Pillow warns about large images, for which MAX_PIXELS is the limit here. Pillow also warns about
    harmless defects, such as a broken EXIF block, without the name of the file.
    """
    Image.MAX_IMAGE_PIXELS = None
    warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")


def open_image(path: str | os.PathLike | IO[bytes]) -> Image.Image:
    """Reads an image file and turns the image upright.

    The EXIF data of the file say which side is up. If the file has several frames, such as an
    animated GIF, only the first frame is read.

    Args:
        path: the image file, or a file that is open for reading in binary mode.

    Returns:
        The whole image in memory, in the mode of the file, such as "RGB" or "L".

    Raises:
        BadImage: the file is missing, broken or an EPS drawing, or the image has more than 120
            million pixels.
        DataFailed: the memory or the file descriptors of the process are exhausted.
    """
    add_heif()
    try:
        with Image.open(path) as image:
            if image.format == "EPS":  # EPS is a program, which Pillow would run with Ghostscript
                raise BadImage("an EPS drawing, no photograph")
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()  # decodes all of it; verify() would miss a truncated JPEG
            return upright(image)
    except FileNotFoundError:
        raise BadImage("the file is gone") from None
    except BROKEN as error:
        if getattr(error, "errno", None) in SCARCITIES:
            raise DataFailed(f"{path}: {_reason(path, error)}; {ADVICE}") from None
        raise BadImage(_reason(path, error)) from None


def _reason(path: str | os.PathLike | IO[bytes], error: Exception) -> str:
    """Returns the message of an error that reading an image file raised.

    If the message is empty, the name of the error's class is returned.

    Args:
        path: the image file. If the message ends with the path, the path is removed from the
            message.
        error: the error.
    """
    text = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
    return text.removesuffix(f" {path!r}").removesuffix(f" {str(path)!r}") or type(error).__name__


def upright(image: Image.Image) -> Image.Image:
    """Returns an image turned upright as the EXIF data of the image say.

    If the EXIF data cannot be read, the image is returned unchanged.
    """
    try:
        turned = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  only the EXIF data are broken, not the picture
        return image
    turned.format = image.format
    return turned


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """Converts a PIL image to an array of bytes, gray or RGB.

    Transparent pixels become white. Integers of 16 bits are divided by 256. Integers of 32 bits are
    clipped to 0..65535 and divided by 256. Floats are multiplied by 255 if all floats of the image
    are in 0..1. Other floats are clipped to 0..255.

    Args:
        image: an image of any mode.
        channels: 1 to convert to gray, any other number to convert to RGB.

    Returns:
        Pixels, uint8 (1, H, W) for gray or (3, H, W) for RGB.

    Raises:
        BadImage: Pillow cannot convert the image to gray or RGB.
    """
    try:
        if image.mode.startswith("I;16") or image.mode == "I":
            values = np.asarray(image).astype(np.int64).clip(0, MAX_OF_16_BITS)
            image = Image.fromarray((values >> 8).astype(np.uint8))
        elif image.mode == "F":
            image = Image.fromarray(_bytes_of_floats(np.asarray(image)))
        elif image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode == "LAB":  # Pillow cannot convert it to gray directly
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


def decode(path: Path | IO[bytes], channels: int) -> np.ndarray:
    """Reads an image file and returns the pixels of the image.

    Args:
        path: the image file, or a file that is open for reading in binary mode.
        channels: 1 to decode to gray, 3 to decode to RGB.

    Returns:
        Pixels, uint8 (channels, H, W).

    Raises:
        BadImage: the file is missing, broken or an EPS drawing, or the image is too large or cannot
            be converted.
        DataFailed: the memory or the file descriptors of the process are exhausted.
    """
    return to_array(open_image(path), channels)
