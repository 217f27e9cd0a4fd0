"""The data path alone: images a second, decoded, augmented, normalised, ready for the model.

    python bench/loader.py --cifar photos/cifar10          about 3 minutes
    python bench/loader.py --quick                         synthetic JPEGs, half a minute

Ours from memory (data.in_memory=auto) and ours image by image (false, 2 workers) against
torchvision's ImageFolder with a DataLoader of 2 workers; crop and flip, batches of 128. Small images
are those of --cifar (train/CLASS/*.jpg of 32 x 32), or made up where there are none; large ones are
made up: JPEGs of 320 x 256 that become 224 x 224. Rounds alternate.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from bench.common import alternate, arguments, finish, ratio, table
from cnn.config import load_config
from cnn.datasets.build import build_data
from cnn.datasets.loader import build_loader
from cnn.utils.memory import keep_freed_memory

BATCH, WORKERS = 128, 2
WARM = 5  # batches before the clock counts: workers start, and fill their queues
ASKED = {"memory": 15, "stream": 1}


def main() -> None:
    parser = arguments(__doc__)
    parser.add_argument("--cifar", type=Path, help="folder of small JPEG files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    keep_freed_memory()
    rounds = 2 if args.quick else args.rounds
    figures = {}
    with tempfile.TemporaryDirectory() as scratch:
        os.environ["XDG_CACHE_HOME"] = f"{scratch}/cache"
        small = args.cifar or make_images(Path(scratch, "small"), 8_000, (32, 32))
        batches = {"memory": 60, "stream": 60, "torchvision": 60}
        figures["32"] = compare(small, 32, batches, rounds, args.device)
        large = make_images(Path(scratch, "large"), 1_200 if args.quick else 2_400, (320, 256))
        batches = (
            {"stream": 14, "torchvision": 14} if not args.quick else {"stream": 7, "torchvision": 7}
        )
        figures["224"] = compare(large, 224, batches, rounds, args.device)
    finish({"device": args.device, "sizes": figures}, args.json)


def make_images(root: Path, number: int, size: tuple[int, int]) -> Path:
    """Smooth noise as JPEG files in two classes: it decodes like photographs."""
    rng = np.random.default_rng(0)
    for index in range(number):
        path = root / "train" / "ab"[index % 2] / f"{index:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        coarse = rng.integers(0, 256, (size[1] // 4, size[0] // 4, 3), np.uint8)
        Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(path, quality=90)
    return root


def compare(root: Path, size: int, batches: dict[str, int], rounds: int, device: str) -> dict:
    """Every way through the same folder, round by round."""
    make = {"memory": ours(root, size, "auto", device), "stream": ours(root, size, "false", device)}
    make["torchvision"] = torchvisions(root, size, device)
    measures = {
        name: lambda name=name, number=number: rate(make[name](), number)
        for name, number in batches.items()
    }
    rates = alternate(measures, rounds)
    rows = [(name, f"{statistics.median(found):,.0f}", f"{min(found):,.0f}", f"{max(found):,.0f}")
            for name, found in rates.items()]  # fmt: skip
    print(f"\n{size} x {size}, {rounds} rounds")
    print(table(["images/s", "median", "least", "largest"], rows))
    ratios = {name: ratio(rates[name], rates["torchvision"]) for name in batches if name in ASKED}
    for name, found in ratios.items():
        print(
            f"{name} over torchvision: {found['median']:.2f}"
            f" ({found['least']:.2f} to {found['largest']:.2f}; asked for: {ASKED[name]})",
            flush=True,
        )
    return {"images_per_second": rates, "ratios": ratios}


def rate(batches: Iterator, number: int) -> float:
    """Images a second over so many batches, after the first few."""
    for _ in range(WARM):
        next(batches)
    began, images = time.perf_counter(), 0
    for _ in range(number):
        images += len(next(batches)[1])
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    del batches
    return images / seconds


def ours(root: Path, size: int, in_memory: str, device: str) -> Callable[[], Iterator]:
    """An endless stream of the project's own batches; each call begins an epoch."""
    settings = [f"data.root={root}", "data.name=folder", "data.augment=[crop, flip]"]
    settings += [f"data.image_size={size}", f"data.batch_size={BATCH}", "data.val_fraction=0.01"]
    settings += [f"data.in_memory={in_memory}", f"data.num_workers={WORKERS}"]
    built = []

    def begin() -> Iterator:
        if not built:
            cfg, _ = load_config(None, settings)
            data = build_data(cfg.data, 0)
            where = torch.device(device)
            built.append(
                build_loader(cfg.data, data.train, data.preprocessing, where, 0, training=True)
            )
        epoch = 0
        while True:
            epoch += 1
            yield from built[0].train_batches(epoch)

    return begin


def torchvisions(root: Path, size: int, device: str) -> Callable[[], Iterator]:
    """The same with ImageFolder and a DataLoader, as torchvision's documentation shows."""
    from torch.utils.data import DataLoader
    from torchvision import datasets, transforms

    change = [
        transforms.RandomCrop(size, padding=size // 8),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    ]
    if size != 32:
        change = [transforms.Resize(size), transforms.CenterCrop(size), *change]
    dataset = datasets.ImageFolder(root / "train", transforms.Compose(change))

    def begin() -> Iterator:
        loader = DataLoader(
            dataset,
            BATCH,
            shuffle=True,
            num_workers=WORKERS,
            persistent_workers=True,
            pin_memory=device != "cpu",
        )
        while True:
            for images, labels in loader:
                yield images.to(device, non_blocking=True), labels.to(device, non_blocking=True)

    return begin


if __name__ == "__main__":
    main()
