"""An image file as pixels: the one way in, for training, validation and prediction."""

import os
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
GRAY_MODES = ("1", "L", "LA", "I", "I;16", "I;16B", "I;16L", "F")
MAX_PIXELS = 120_000_000  # of one image: 360 MB as RGB; more is taken for a decompression bomb

Image.MAX_IMAGE_PIXELS = None  # our own limit below, an error and not a warning


class BadImage(Exception):
    """An image that cannot be had: no image, not whole, gone. As `decode` raises it, without path."""


def open_image(path: str | os.PathLike) -> Image.Image:
    """Reads a whole image file, turned as its EXIF data says; BadImage where it is not one."""
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise BadImage(f"{image.width} x {image.height} pixels, more than {MAX_PIXELS:,}")
            image.load()  # decodes all of it; verify() would miss a truncated JPEG
            return ImageOps.exif_transpose(image)
    except FileNotFoundError:
        raise BadImage("the file is gone") from None
    except (OSError, SyntaxError, ValueError, EOFError, MemoryError, Image.DecompressionBombError,
            IndexError, KeyError, TypeError, OverflowError, ZeroDivisionError) as error:  # fmt: skip
        # Pillow's decoders raise all of these on broken files.
        raise BadImage(str(error).removesuffix(f" {str(path)!r}") or type(error).__name__) from None


def to_array(image: Image.Image, channels: int) -> np.ndarray:
    """Pixels of a PIL image as uint8 (channels, H, W); what is transparent becomes white."""
    if image.mode.startswith("I;16") or image.mode == "I":  # 16 bits a pixel: keep the upper 8
        image = Image.fromarray((np.asarray(image).astype(np.uint32) >> 8).astype(np.uint8))
    elif image.mode == "P" and "transparency" in image.info or image.mode in ("LA", "PA", "RGBA"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    image = image.convert("L" if channels == 1 else "RGB")
    array = np.array(image)  # H, W[, 3]
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def decode(path: Path, channels: int) -> np.ndarray:
    """The file's pixels as uint8 (channels, H, W)."""
    return to_array(open_image(path), channels)
