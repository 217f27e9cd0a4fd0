"""TIFF files of kinds that Pillow does not read, or reads wrongly: what they are."""

import contextlib
import os
from typing import IO, Any

from PIL.TiffImagePlugin import ImageFileDirectory_v2

from cnn.errors import BadImage

Tags = dict[int, Any]  # of one page of a file, by number

# The numbers of some tags, in the specification TIFF 6.0.
SUBFILE, WIDTH, HEIGHT, BITS, PHOTOMETRIC = 254, 256, 257, 258, 262
BANDS, PLANAR, EXTRA, SAMPLE_FORMAT = 277, 284, 338, 339
REDUCED_OR_MASK = 1 | 4  # bits of SUBFILE
SEPARATE = 2  # by PLANAR
NUM_COLORS = {0: 1, 1: 1, 3: 1, 5: 4}  # by PHOTOMETRIC; 3 for all others, such as RGB
KINDS = {1: "uint", 2: "int", 3: "float"}  # by SAMPLE_FORMAT


def read_tags(path: str | os.PathLike | IO[bytes]) -> Tags | None:
    """Returns the tags of a TIFF file with one image, or None for a file of another format.

    Args:
        path: the file, or a file that is open for reading in binary mode.

    Raises:
        BadImage: the file has several images, besides previews and masks. Or the image has more
            bands than colors and transparency, or deep bands one after the other.
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
    is_mixed_up = bands > 1 and first.get(PLANAR) == SEPARATE and first.get(BITS, (1,))[0] > 8
    if bands > colors + 1 or (bands == colors + 1 and is_unknown) or is_mixed_up:
        raise BadImage(f"a TIFF of {bands} bands; expected gray or RGB, band by band in each pixel")
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
