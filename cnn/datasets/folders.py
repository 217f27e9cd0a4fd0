"""Datasets of the user's files: a folder with one folder of images per class."""

from logging import WARNING
from pathlib import Path

from cnn.config import DataConfig
from cnn.datasets.findings import Findings
from cnn.datasets.image_files import EXTENSIONS, image_files
from cnn.datasets.listing import Listing, split_of
from cnn.errors import Refused

LAYOUT = "ROOT/CLASS/*.jpg, or ROOT/train/CLASS/*.jpg with val/ and test/ beside train/"


def list_folder(cfg: DataConfig, findings: Findings, *, needs_train: bool = True) -> Listing:
    """Lists the images of a folder that has one folder per class.

    The images are in ROOT/SPLIT/CLASS/ or, without splits, in ROOT/CLASS/. SPLIT is train, val or
    test. CLASS is the name of a class.

    Args:
        cfg: the section `data` of the settings. `cfg.root` is the folder ROOT.
        findings: gets the facts that the user has to know, such as folders that are not used.
        needs_train: whether training images are required.

    Returns:
        The images by split. Without splits, all images are under "train".

    Raises:
        Refused: the folder or the training images are missing, or a class folder is empty. A split
            has two folders, such as val and valid.
    """
    top = Path(cfg.root)
    if not top.is_dir():
        raise Refused(f"data.root: expected a folder, {LAYOUT}; there is none at {top.resolve()}")
    folders = _find_splits(top, findings)
    if folders and "train" not in folders and needs_train:
        raise Refused(f"data.root: {top} has {' and '.join(folders)}, but no train: {LAYOUT}")
    listing = {split: _list_images(folder) for split, folder in folders.items()}
    return listing or {"train": _list_images(top)}


def _find_splits(top: Path, findings: Findings) -> dict[str, Path]:
    """Finds the folders of the splits inside a dataset's folder.

    The folder of a split has the name train, val, valid, validation or test, in upper or lower
    case. If the dataset has splits, a warning lists other folders, which are not used.

    Args:
        top: the folder of the dataset.
        findings: gets a warning about folders that are not used.

    Returns:
        A dict from "train", "val" or "test" to the folder. A split without a folder is not in the
        dict.

    Raises:
        Refused: two folders belong to the same split, such as val and valid.
    """
    folders, splits = _list_folders(top), {}
    for folder in folders:
        split = split_of(folder.name)
        if split in splits:
            both = f"{splits[split].name} and {folder.name}"
            raise Refused(f"data.root: {top} has two folders for {split}, {both}; keep one of them")
        if split is not None:
            splits[split] = folder
    unused = [folder.name for folder in folders if folder not in splits.values()]
    if splits and unused:
        one = next(iter(splits.values())).name
        findings.add(f"{top}: beside {one}, used for nothing: {', '.join(unused)}", level=WARNING)
    return splits


def _list_folders(path: Path) -> list[Path]:
    """Returns the folders directly inside a folder, sorted by name.

    Folders whose names begin with "." or "__" are left out.
    """
    inner = (p for p in path.iterdir() if p.is_dir() and not p.name.startswith((".", "__")))
    return sorted(inner, key=lambda p: p.name)


def _list_images(path: Path) -> list[tuple[Path, str]]:
    """Lists the image files in a folder that has one folder per class.

    Args:
        path: the folder that contains the class folders.

    Returns:
        (image file, class name) for every image. The class name is the name of the class folder.

    Raises:
        Refused: there are no class folders, or a class folder has no images.
    """
    folders = _list_folders(path)
    if not folders:
        raise Refused(f"data.root: expected class folders, {LAYOUT}; there are none in {path}")
    items = []
    for folder in folders:
        files = sorted(image_files(folder))
        if not files:
            advice = f"({' '.join(EXTENSIONS)}); put some there or remove the folder"
            raise Refused(f"data.root: the class folder {folder} has no images {advice}")
        items += [(file, folder.name) for file in files]
    return items
