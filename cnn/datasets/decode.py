"""Decoding of image files to pixels, the same for training, validation and prediction."""

import os
import warnings
from pathlib import Path
from typing import IO, Any

import numpy as np
import PIL
from PIL import ExifTags, Image, ImageOps

from cnn.datasets import tiff
from cnn.datasets.image_files import add_heif
from cnn.datasets.value_range import PER_IMAGE, ValueRange, to_bytes
from cnn.errors import ADVICE, SCARCITIES, BadImage, DataFailed

VERSION = 3  # incremented when files decode to other pixels, so that old caches are not used
DECODER = f"{VERSION}_{PIL.__version__}"  # what the pixels of a file depend on, besides its bytes
LYING = (5, 6, 7, 8)  # values of EXIF's Orientation for which width and height are exchanged
GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
MAX_PIXELS = 120_000_000  # per image: 360 MB as RGB; a larger image can be a decompression bomb

WIDE = ("'RGB;16", "'RGBA;16", "'RGBX;16", "'LA;16")  # Pillow reads only 8 bits of these forms
SIGNS_LOST = ("int8", "uint32")  # types of TIFF files that Pillow takes for uint8 and int32

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


def open_image(path: str | os.PathLike | IO[bytes], least_side: int | None = None) -> Image.Image:
    """Reads an image file and turns the image upright.

    The EXIF data of the file say which side is up. If the file has several frames, such as an
    animated GIF, only the first frame is read.

    Args:
        path: the image file, or a file that is open for reading in binary mode.
        least_side: the pixels that the shorter side needs at least. A JPEG file is decoded at 1/2,
            1/4 or 1/8 of its size, if that is enough. None decodes all pixels.

    Returns:
        The whole image in memory, in the mode of the file, such as "RGB" or "L". The function
        `deep_values` returns the values of an image with more than 8 bits. The attribute
        `full_size` has the width and height of the image in the file.

    Raises:
        BadImage: the file is missing, broken or an EPS drawing, or the image has more than 120
            million pixels. Or the file is a TIFF with several images or unknown bands.
        DataFailed: the memory or the file descriptors of the process are exhausted.
    """
    add_heif()
    try:
        try:
            image = Image.open(path)
        except (PIL.UnidentifiedImageError, ValueError):
            if tags := tiff.read_tags(path):
                kind = f"{tiff.dtype_name(tags)} values in {tags.get(tiff.BANDS, 1)} bands"
                raise BadImage(f"a TIFF of {kind}; save it as 8 or 16 bits") from None
            raise
        with image:
            if image.format == "EPS":  # EPS is a program, which Pillow would run with Ghostscript
                raise BadImage("an EPS drawing, no photograph")
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            tags = tiff.read_tags(path) if image.format == "TIFF" else None
            is_wide = any(form in str(image.tile[:1]) for form in WIDE)
            turned = _load(image, least_side)
        if is_wide:
            turned.values = _wide_values(path, turned)
        elif tags and tiff.dtype_name(tags) in SIGNS_LOST:
            turned.values = np.asarray(turned).view(tiff.dtype_name(tags))
        return turned
    except FileNotFoundError:
        raise BadImage("the file is gone") from None
    except BROKEN as error:
        if getattr(error, "errno", None) in SCARCITIES:
            raise DataFailed(f"{path}: {_reason(path, error)}; {ADVICE}") from None
        raise BadImage(_reason(path, error)) from None


def _load(image: Image.Image, least_side: int | None) -> Image.Image:
    """Decodes an image, and returns it upright and with the attribute `full_size`.

    Args:
        image: an image of which Pillow has read the header.
        least_side: the pixels that the shorter side needs at least, or None for all pixels.
    """
    full_size = image.size
    if least_side is not None:  # the inverse DCT of a JPEG file then makes fewer pixels
        scale = scale_of(min(full_size), least_side)
        image.draft(None, (image.width // scale, image.height // scale))
    image.load()  # decodes all of it; verify() would miss a truncated JPEG
    turned = upright(image)
    lies = turned is not image and image.getexif()[ExifTags.Base.Orientation] in LYING
    turned.full_size = full_size[::-1] if lies else full_size
    return turned


def scale_of(shorter: Any, least_side: int) -> Any:
    """Returns the divisor by which the decoding of a JPEG file reduces the image: 1, 2, 4 or 8.

    Args:
        shorter: the pixels of the image's shorter side, as a number or an array.
        least_side: the pixels that are needed at least.
    """
    return 1 + sum(half * (shorter // (2 * half) >= least_side) for half in (1, 2, 4))


def read_header(path: Path) -> tuple[int, int, bool]:
    """Reads the header of an image file.

    Returns:
        The height and the width in pixels, before the image is turned upright, and whether the
        image is gray. (0, 0, False) for a file that cannot be opened.
    """
    add_heif()
    try:
        with Image.open(path) as image:
            return image.height, image.width, image.mode in GRAY_MODES
    except Exception:  # noqa: BLE001  the reason is told when the file is decoded
        return 0, 0, False


def _wide_values(path: str | os.PathLike | IO[bytes], image: Image.Image) -> np.ndarray:
    """Reads the values of an image with 16 bits per color, of which Pillow reads the upper 8.

    The file is decoded a second time, as if the two bytes of a value were in the other order. Then
    Pillow reads the lower 8 bits. Pairs of gray and alpha are decoded as four bytes instead.

    Args:
        path: the image file, or a file that is open for reading in binary mode.
        image: the upright image, as Pillow reads it.

    Returns:
        The values, uint16 (H, W, 3), (H, W, 4) with alpha, or (H, W, 2) for gray with alpha.
    """
    with Image.open(path) as again:
        is_pair = "LA;16" in str(again.tile)
        again.tile = [tile._replace(args=_in_other_order(tile.args)) for tile in again.tile]
        again.load()
        other = np.asarray(upright(again))
    return other.view(">u2") if is_pair else np.asarray(image).astype(np.uint16) * 256 + other


def _in_other_order(args: str | tuple[Any, ...]) -> str | tuple[Any, ...]:
    """Returns the arguments of a decoder of Pillow, such as "RGB;16B", for the other byte order."""
    if isinstance(args, tuple):
        return _in_other_order(args[0]), *args[1:]
    return "RGBA" if args == "LA;16B" else args[:-1] + ("L" if args[-1] == "B" else "B")


def deep_values(image: Image.Image) -> np.ndarray | None:
    """Returns the values of an image with more than 8 bits per value, or None for other images.

    Args:
        image: an image that `open_image` returned, or any other PIL image.

    Returns:
        Integers of any type or floats, (H, W) for gray, or (H, W, C). C is 3 for RGB, 4 for RGB
        with alpha, or 2 for gray with alpha.
    """
    if hasattr(image, "values"):
        return image.values
    is_deep = image.mode in ("I", "F") or image.mode.startswith("I;16")
    return np.asarray(image) if is_deep else None


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

    If the image is upright or the EXIF data cannot be read, the same image is returned.
    """
    try:
        if image.getexif().get(ExifTags.Base.Orientation, 1) == 1:
            return image
        turned = ImageOps.exif_transpose(image)
    except Exception:  # noqa: BLE001  only the EXIF data are broken, not the picture
        return image
    turned.format = image.format
    return turned


def to_array(image: Image.Image, channels: int, value_range: ValueRange = PER_IMAGE) -> np.ndarray:
    """Converts a PIL image to an array of bytes, gray or RGB.

    Transparent pixels become white.

    Args:
        image: an image of any mode.
        channels: 1 to convert to gray, any other number to convert to RGB.
        value_range: how values of more than 8 bits become bytes.

    Returns:
        Pixels, uint8 (1, H, W) for gray or (3, H, W) for RGB, channels last in memory.

    Raises:
        BadImage: Pillow cannot convert the image to gray or RGB. Or the values of the image are
            floats, and the model was trained on images of 8 bits.
    """
    try:
        values = deep_values(image)
        if values is not None:
            image = Image.fromarray(to_bytes(values, value_range))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        if image.mode == "LAB":  # Pillow cannot convert it to gray directly
            image = image.convert("RGB")
        mode = "L" if channels == 1 else "RGB"
        image = image if image.mode == mode else image.convert(mode)
    except (*BROKEN, ImportError) as error:
        raise BadImage(str(error) or type(error).__name__) from None
    array = np.array(image)  # H, W[, 3]
    return array[None] if channels == 1 else array.transpose(2, 0, 1)
