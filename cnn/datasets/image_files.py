"""The search for image files in folders and by patterns; it opens no file and imports no torch."""

import glob
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

EXTENSIONS = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
WILDCARDS = "*?["


def image_files(folder: Path) -> Iterator[Path]:
    """Yields the image files in a folder and in all folders inside the folder.

    Folders are searched to any depth. Image files are recognized by the extension, such as .jpg or
    .PNG. Files whose names begin with a dot are left out. Links to folders are followed, but no
    folder is searched twice.
    """
    seen = set()
    for where, folders, names in os.walk(folder, followlinks=True):
        if os.path.realpath(where) in seen:  # a link to a folder that was already searched
            folders.clear()
            continue
        seen.add(os.path.realpath(where))
        folders.sort()
        for name in names:
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(where, name)


def find_images(
    words: Iterable[str], *, patterns: bool = True
) -> Iterator[tuple[Path, str | None]]:
    """Finds the image files that the arguments of a command name.

    Args:
        words: the arguments. An argument is a file with any extension, a folder, or a pattern such
            as `*.jpg`.
        patterns: whether an argument can be a pattern. If False, every argument is the name of a
            file or of a folder.

    Yields:
        (path, None) for every file that is found. If a path or a pattern leads to no file, (path,
        reason) is yielded instead. The reason is a text such as "no such file or folder".
    """
    for word in words:
        # Unlike Path.exists, os.path.exists is False for a name that no file can have.
        found = [word] if os.path.exists(word) else _matching(word) if patterns else []
        for name in found:
            yield from _files_at(Path(name))
        if not found:
            is_pattern = patterns and any(sign in word for sign in WILDCARDS)
            yield Path(word), "no file has such a name" if is_pattern else "no such file or folder"


def _matching(pattern: str) -> list[str]:
    """Returns the paths that match a glob pattern, sorted.

    Links to folders can give one file several paths. Of several paths to one file, only the first
    path is returned.
    """
    found: dict[tuple[str, str], str] = {}
    for name in sorted(glob.glob(pattern, recursive=True)):
        folder, file = os.path.split(name)
        found.setdefault((os.path.realpath(folder), file), name)
    return list(found.values())


def _files_at(path: Path) -> Iterator[tuple[Path, str | None]]:
    if path.is_dir():
        files = sorted(image_files(path))
        yield from ((file, None) for file in files)
        if not files:
            yield path, f"a folder without images ({' '.join(EXTENSIONS)})"
    elif path.is_file():
        yield path, None
    else:  # a pipe or a device, which might never end, or a link to nothing
        exists = os.path.exists(path)
        yield path, "neither a file nor a folder" if exists else "no such file or folder"
