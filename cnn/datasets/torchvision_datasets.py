"""The well-known sets, read by torchvision: MNIST and its kin, CIFAR, SVHN."""

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

# name in the configuration: torchvision's class, folder below root, files in it
FILES = {
    "mnist": ("MNIST", "MNIST/raw", MNIST_FILES),
    "fashion_mnist": ("FashionMNIST", "FashionMNIST/raw", MNIST_FILES),
    "kmnist": ("KMNIST", "KMNIST/raw", MNIST_FILES),
    "cifar10": ("CIFAR10", "cifar-10-batches-py", CIFAR10_FILES),
    "cifar100": ("CIFAR100", "cifar-100-python", ["train", "test", "meta"]),
    "svhn": ("SVHN", ".", ["train_32x32.mat", "test_32x32.mat"]),
}
PARTS = ("train", "test")
DOWNLOAD_TIMEOUT = 30  # seconds without an answer


def load(name: str, root: str, download: bool) -> tuple[dict[str, ArrayImages], list[str]]:
    """Reads train and test of a known set.

    Raises:
        Refused: files missing or broken, with what was looked for and what to do.
    """
    class_name, folder, files = FILES[name]
    missing = [file for file in files if not (Path(root) / folder / file).is_file()]
    if missing and not download:
        raise Refused(
            f"data.root: {name}: missing {', '.join(missing)}\n"
            f"  looked for in {(Path(root) / folder).resolve()}\n"
            f"  download them with data.download=true, or put them there by hand;\n"
            f"  data.name=digits needs no files"
        )
    from torchvision import datasets

    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(DOWNLOAD_TIMEOUT)
    try:
        # torchvision fetches only what is missing, with a bar, and checks what came.
        read = getattr(datasets, class_name)
        if name == "svhn":
            sets = {part: read(root, part, download=bool(missing)) for part in ("train", "test")}
        else:
            sets = {part: read(root, part == "train", download=bool(missing)) for part in PARTS}
    except ImportError as error:
        raise Refused(f"data.name: {name} needs a package: pip install {error.name}") from None
    except Exception as error:  # noqa: BLE001  network, disk, or a broken file: each reader has its own errors
        what = "download" if missing else "read"
        raise Refused(
            f"data.root: {name}: cannot {what} the files in {Path(root).resolve()}:"
            f" {type(error).__name__}: {error}\n"
            f"  expected in {folder}: {', '.join(files)}; remove what is broken and fetch it again"
            f" with data.download=true,\n  or put it there by hand; data.name=digits needs no files"
        ) from None
    finally:
        socket.setdefaulttimeout(before)
    classes = getattr(sets["train"], "classes", [str(digit) for digit in range(10)])
    return {part: _images(sets[part], f"{name} {part}") for part in PARTS}, list(classes)


def _images(dataset: Any, name: str) -> ArrayImages:
    """torchvision's arrays, (N, H, W), (N, H, W, 3) or (N, 3, H, W), as (N, C, H, W)."""
    pixels = np.asarray(dataset.data)
    labels = dataset.targets if hasattr(dataset, "targets") else dataset.labels
    if pixels.ndim == 3:
        pixels = pixels[:, None]
    elif pixels.shape[-1] == 3:
        pixels = pixels.transpose(0, 3, 1, 2)  # a view: they are kept as they came
    return ArrayImages(pixels, np.asarray(labels), name)
