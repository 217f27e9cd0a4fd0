"""Well-known datasets that torchvision reads: MNIST, similar datasets of its size, CIFAR, SVHN."""

import socket
from pathlib import Path
from typing import Any

import numpy as np

from cnn.datasets.images import ArrayImages
from cnn.errors import Refused

MNIST_FILES = [
    f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")
]
CIFAR10_FILES = [*(f"data_batch_{n}" for n in range(1, 6)), "test_batch", "batches.meta"]

# By the name in the settings: torchvision's class, the folder below root, the files in it.
FILES = {
    "mnist": ("MNIST", "MNIST/raw", MNIST_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", MNIST_FILES),
    "kmnist": ("KMNIST", "KMNIST/raw", MNIST_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", CIFAR10_FILES),
    "cifar100": ("CIFAR100", "cifar-100-python", ["train", "test", "meta"]),
    "svhn": ("SVHN", ".", ["train_32x32.mat", "test_32x32.mat"]),
}
SPLITS = ("train", "test")
DOWNLOAD_TIMEOUT = 30  # seconds to wait for an answer of the server


def load(name: str, root: str, download: bool) -> tuple[dict[str, ArrayImages], list[str]]:
    """Reads one of torchvision's datasets from files.

    Args:
        name: the dataset's name in the settings, such as "cifar10". The constant `FILES` lists all
            names.
        root: the folder that contains the datasets. The files of a dataset are in an inner folder,
            such as "MNIST/raw". Only the files of "svhn" are directly in `root`.
        download: whether to download missing files.

    Returns:
        Two values. The first value is a dict from "train" and "test" to the images. The second
        value is a list of the class names in the order of the labels.

    Raises:
        Refused: files are missing, broken or cannot be downloaded, or a Python package is missing.
    """
    class_name, folder, files = FILES[name]
    where = (Path(root) / folder).resolve()
    advice = "data.download=true downloads them; data.name=digits needs no files"
    missing = [file for file in files if not (where / file).is_file()]
    if missing and not download:
        raise Refused(f"data.root: {name}: missing {', '.join(missing)} in {where}; {advice}")
    import torchvision

    # torchvision downloads only missing files, with a progress bar, and verifies them.
    read = getattr(torchvision.datasets, class_name)
    splits = SPLITS if name == "svhn" else (True, False)
    if missing:
        socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)  # of this process, since torchvision sets none
    try:
        datasets = [read(root, split, download=bool(missing)) for split in splits]
    except ImportError as error:
        raise Refused(f"data.name: {name} needs a package: pip install {error.name}") from None
    except Exception as error:  # noqa: BLE001  network, disk, or a broken file
        action = "download" if missing else "read"
        raise Refused(
            f"data.root: {name}: cannot {action} {', '.join(files)} in {where}:"
            f" {type(error).__name__}: {error}; remove broken files. {advice}"
        ) from None
    classes = getattr(datasets[0], "classes", [str(digit) for digit in range(10)])
    images = [_to_images(data, f"{name} {split}") for split, data in zip(SPLITS, datasets)]
    return dict(zip(SPLITS, images)), list(classes)


def _to_images(dataset: Any, name: str) -> ArrayImages:
    """Converts a dataset of torchvision to images in memory.

    Args:
        dataset: the dataset. The attribute `data` has the pixels, uint8 (N, H, W), (N, H, W, 3) or
            (N, 3, H, W). The attribute `targets` or `labels` has the labels.
        name: name of the returned images in messages, such as "mnist train".
    """
    pixels = np.asarray(dataset.data)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)  # a view, which ArrayImages stores without a copy
    return ArrayImages(pixels, labels, name)
