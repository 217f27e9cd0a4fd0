"""Image files by their names: in folders, behind patterns. Opens none, and imports no torch."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
WILDCARDS = "*?["


def image_files(folder: Path) -> Iterable[Path]:
    """The image files in a folder and those below it, by their extensions, without hidden ones."""
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in seen:  # a link back to where we come from
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders.sort()
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(where, name)


def find_images(words: Iterable[str]) -> Iterator[tuple[Path, str | None]]:
    """The image files that words mean: files, folders with all below them, patterns such as `*.jpg`.

    A file that is named is taken whatever its extension.

    Yields:
        Each path, with why it is no file to open, or None where it is one.
    """
    for word in words:
        path = Path(word)
        if os.path.exists(path):  # False for a name that no file can have, where Path raises
            yield from _of(path)
        elif any(sign in word for sign in WILDCARDS):
            found = _matching(word)
            if not found:
                yield path, "no file has such a name"
            for name in found:
                yield from _of(Path(name))
        else:
            yield path, "no such file or folder"


def _matching(pattern: str) -> list[str]:
    """What the pattern means, by name; once, where a link leads back to where it comes from."""
    found: dict[tuple[str, str], str] = {}
    for name in sorted(glob.glob(pattern, recursive=True)):
        folder, file = os.path.split(name)
        found.setdefault((os.path.realpath(folder), file), name)
    return list(found.values())


def _of(path: Path) -> Iterator[tuple[Path, str | None]]:
    if path.is_dir():
        files = sorted(image_files(path))
        yield from ((file, None) for file in files)
        if not files:
            yield path, f"a folder without images ({' '.join(EXTENSIONS)})"
    elif path.is_file():
        yield path, None
    else:  # a pipe or a device might never end
        yield path, "neither a file nor a folder"
