"""TIFF files of kinds that Pillow does not read, or reads wrongly: what they are, their values."""

import contextlib
import os
from typing import IO, Any

import numpy as np
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cnn.errors import BadImage

Tags = dict[int, Any]  # of one page of a file, by number

# The numbers of some tags, in the specification TIFF 6.0.
SUBFILE, WIDTH, HEIGHT, BITS, PHOTOMETRIC, ORIENTATION = 254, 256, 257, 258, 262, 274
BANDS, PLANAR, EXTRA, SAMPLE_FORMAT = 277, 284, 338, 339
REDUCED_OR_MASK = 1 | 4  # bits of SUBFILE
NUM_COLORS = {0: 1, 1: 1, 3: 1, 5: 4}  # by PHOTOMETRIC; 3 for all others, such as RGB
GRAY_OR_RGB = (0, 1, 2)  # by PHOTOMETRIC
KINDS = {1: "uint", 2: "int", 3: "float"}  # by SAMPLE_FORMAT


def read_tags(path: str | os.PathLike | IO[bytes]) -> Tags | None:
    """Returns the tags of a TIFF file with one image, or None for a file of another format.

    Args:
        path: the file, or a file that is open for reading in binary mode.

    Raises:
        BadImage: the file has several images, besides previews and masks. Or the image has more
            bands than colors and transparency.
    """
    first, *others = _read_pages(path) or [None]
    if first is None:
        return None
    area = first.get(WIDTH, 0) * first.get(HEIGHT, 0)
    images = [page for page in others if page.get(WIDTH, 0) * page.get(HEIGHT, 0) > area / 2]
    number = 1 + sum(not page.get(SUBFILE, 0) & REDUCED_OR_MASK for page in images)
    if number > 1:
        raise BadImage(f"a TIFF of {number} pages; save each page as a file of its own")
    bands, colors = first.get(BANDS, 1), NUM_COLORS.get(first.get(PHOTOMETRIC, 1), 3)
    is_unknown = colors == 1 and not first.get(EXTRA, (0,))[0]  # the band after gray
    if bands > colors + 1 or (bands == colors + 1 and is_unknown):
        raise BadImage(f"a TIFF of {bands} bands; expected gray or RGB")
    return first


def _read_pages(path: str | os.PathLike | IO[bytes]) -> list[Tags]:
    pages = {}
    with contextlib.suppress(Exception), _opened(path) as file:  # Pillow may raise anything
        file.seek(0)
        header = file.read(8)
        tags = ImageFileDirectory_v2(header + (file.read(8) if header[2] == 43 else b""))
        while tags.next and tags.next not in pages:
            place = tags.next
            file.seek(place)
            tags.load(file)
            pages[place] = dict(tags)
    return list(pages.values())


def _opened(path: str | os.PathLike | IO[bytes]) -> contextlib.AbstractContextManager[IO[bytes]]:
    return open(path, "rb") if isinstance(path, str | os.PathLike) else contextlib.nullcontext(path)


def dtype_name(tags: Tags) -> str:
    """Returns the name of the type of the values that a TIFF file has, such as "uint16"."""
    return f"{KINDS.get(tags.get(SAMPLE_FORMAT, (1,))[0], 'complex')}{tags.get(BITS, (1,))[0]}"


def is_for_pillow(tags: Tags) -> bool:
    """Returns whether Pillow reads an image as it is, if Pillow reads the image at all."""
    return tags.get(BANDS, 1) == 1 or tags.get(PLANAR, 1) == 1 or tags.get(BITS, (1,))[0] <= 8


def read_values(path: str | os.PathLike | IO[bytes], tags: Tags) -> np.ndarray:
    """Reads a TIFF file with the package tifffile.

    Args:
        path: the file, or a file that is open for reading in binary mode.
        tags: the tags of the file.

    Returns:
        The values of the image, (H, W) for gray or (H, W, C) for C bands.

    Raises:
        BadImage: tifffile is not installed or cannot read the file. Or the values are not numbers
            of an upright gray or RGB image.
    """
    kind = f"a TIFF of {dtype_name(tags)} values in {tags.get(BANDS, 1)} bands"
    try:
        import tifffile
    except ImportError:
        raise BadImage(f"{kind}, which Pillow cannot read; pip install tifffile") from None
    try:
        with _opened(path) as file:
            file.seek(0)
            page = tifffile.TiffFile(file).pages[0]
            values, axes = page.asarray(), page.axes
    except Exception as error:  # noqa: BLE001  the package raises anything for broken files
        raise BadImage(f"{kind}: {error or type(error).__name__}") from None
    is_plain = tags.get(ORIENTATION, 1) == 1 and tags.get(PHOTOMETRIC, 1) in GRAY_OR_RGB
    if axes not in ("YX", "YXS", "SYX") or values.dtype.kind not in "uif" or not is_plain:
        raise BadImage(f"{kind}; expected the numbers of an upright image, gray or RGB")
    values = np.moveaxis(values, 0, -1) if axes == "SYX" else values
    return values if tags.get(EXTRA, (1,))[0] else values[..., :3]  # 0: the fourth band is no alpha
