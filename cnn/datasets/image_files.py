"""The search for image files in folders and by patterns; it opens no file and imports no torch."""

import functools
import glob
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

# Folders that file managers, network drives and operating systems make, in lower case. Besides,
# every folder whose name begins with HIDDEN is left out, such as .Trash-1000.
SYSTEM_FOLDERS = {
    *("__macosx", "__pycache__", "$recycle.bin", "recycler", "system volume information"),
    *("lost+found", "@eadir", "@recycle", "@tmp", "#recycle", "#snapshot"),
}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}
HIDDEN = "."

# Formats that Pillow lists, but that are programs, drawings or films, or that Pillow cannot decode.
NO_IMAGES = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}
# For messages.
ENDINGS = ".jpg, .png, .tif and all others that Pillow reads; HEIC after pip install pillow-heif"
HEIF = (".heic", ".heif")  # among the other files where Pillow does not read them
WILDCARDS = "*?["


@functools.cache
def add_heif() -> None:
    """Lets Pillow decode HEIC images, if the package pillow-heif is installed."""
    with suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()


@functools.cache
def image_endings() -> frozenset[str]:
    """Returns the endings of the image files that the installed Pillow reads, such as ".jpg"."""
    from PIL import Image  # imported here: it takes half of a refusal's time

    Image.init()
    add_heif()
    readable = Image.OPEN.keys() - NO_IMAGES | {"MPO"}  # Pillow opens MPO as JPEG
    endings = Image.registered_extensions().items()
    return frozenset(ending for ending, kind in endings if kind in readable)


def ending_of(name: str) -> str:
    """Returns the ending of a file name in lower case, such as ".jpg", or ""."""
    return os.path.splitext(name)[1].lower()


def is_system(name: str) -> bool:
    """Returns whether a folder or a file is hidden or belongs to an operating system.

    Such a folder never contains images of the user, and such a file is none.

    Args:
        name: the name of the folder or the file, without a path.
    """
    return name.startswith(HIDDEN) or name.lower() in SYSTEM_FOLDERS


@dataclass
class Folder:
    """A folder with its images and the folders inside, without hidden and system folders.

    Attributes:
        path: the path of the folder.
        images: the paths of the image files directly in the folder.
        others: the paths of all other files directly in the folder, but for system files.
        folders: the folders directly in the folder, sorted by name.
    """

    path: str
    images: list[str] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    folders: list["Folder"] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The name of the folder, without a path."""
        return os.path.basename(self.path)

    def all_folders(self) -> list["Folder"]:
        """Returns the folder itself and the folders inside, to any depth."""
        found = [self]
        for folder in found:
            found += folder.folders
        return found

    def num_images(self) -> int:
        """Returns the number of images in the folder and in all folders inside."""
        return sum(len(folder.images) for folder in self.all_folders())

    def all_images(self) -> list[str]:
        """Returns the paths of the images in the folder and in all folders inside.

        The paths are sorted part by part, as pathlib sorts them.
        """
        paths = (path for folder in self.all_folders() for path in folder.images)
        return sorted(paths, key=lambda path: path.split(os.sep))


def read_folder(path: str | Path, *, deep: bool = True) -> Folder:
    """Reads the names in a folder and in all folders inside, to any depth.

    Image files are recognized by the ending, such as .jpg or .PNG. Links to folders are followed,
    but no folder is read twice, and no folder that contains `path`. A folder that cannot be read
    counts as empty.

    Args:
        path: the folder. Its own name may be that of a hidden or a system folder.
        deep: whether to read the folders inside. If False, these folders are listed, but empty.
    """
    top, endings = Folder(str(path)), image_endings()
    folders, real = {top.path: top}, os.path.realpath(path)
    seen = {real, *map(str, Path(real).parents)}
    for where, names, files in os.walk(path, followlinks=True):
        folder = folders[where]
        for name in sorted(files):
            if not name.startswith(".") and name.lower() not in SYSTEM_FILES:
                kind = folder.images if ending_of(name) in endings else folder.others
                kind.append(os.path.join(where, name))
        for name in sorted(names):
            real = os.path.realpath(inner := os.path.join(where, name))
            if not is_system(name) and real not in seen:
                if deep:
                    seen.add(real)
                folder.folders.append(folders.setdefault(inner, Folder(inner)))
        names[:] = [inner.name for inner in folder.folders if deep]  # those that are read next
    return top


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
    path is returned. Paths in a hidden or a system folder are left out unless the pattern names the
    folder.
    """
    typed, found = pattern.split(os.sep), {}
    for name in sorted(glob.glob(pattern, recursive=True)):
        folder, file = os.path.split(name)
        folders = name if os.path.isdir(name) else folder
        # A wildcard matches no dot at the beginning, so a folder with a dot was typed.
        if not any(is_system(p) and p[0] != "." and p not in typed for p in folders.split(os.sep)):
            found.setdefault((os.path.realpath(folder), file), name)
    return list(found.values())


def _files_at(path: Path) -> Iterator[tuple[Path, str | None]]:
    if path.is_dir():
        folder = read_folder(path)
        files = [(Path(file), None) for file in folder.all_images()]
        others = [Path(file) for inner in folder.all_folders() for file in inner.others]
        files += [(Path(f), "pip install pillow-heif") for f in others if ending_of(f) in HEIF]
        yield from files
        if not files:
            yield path, f"a folder without images ({ENDINGS})"
    elif path.is_file():
        yield path, None
    else:  # a pipe or a device, which might never end, or a link to nothing
        exists = os.path.exists(path)
        yield path, "neither a file nor a folder" if exists else "no such file or folder"
