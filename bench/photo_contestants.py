"""One run of photos.py, in a process of its own: ours or one of the three peers.

    python bench/photo_contestants.py NAME FOLDER [--train]

NAME is ours, torchvision, timm or ultralytics; FOLDER has train/CLASS/*.jpg. Three epochs are loaded,
and with --train resnet18 takes a step on each batch. The peers are written as their documentation
shows, with 2 workers as ours; pictures, batch size and augmentation (a crop of 0.35 to 1 of the area,
resized to 224, and a flip) are the same for all. The last line of its output is JSON: images, seconds
and seconds of waiting for each epoch, and when the first step was done. The first epoch counts from
the listing of the folder on, and what is done there before the first batch is waiting.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

SIDE, SCALE, WORKERS, EPOCHS = 224, (0.35, 1.0), 2, 3
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # ours takes those of the pictures

# Each yields None when all is imported, and then the batches of one epoch after the other.


def ours(root: Path, batch: int, device: str) -> Iterator[Iterable | None]:
    import torch

    from cnn.config import load_config
    from cnn.datasets.build import build_data
    from cnn.datasets.loader import build_loader

    settings = [f"data.root={root}", "data.name=folder", "data.augment=[resized_crop, flip]"]
    settings += [f"data.image_size={SIDE}", f"data.batch_size={batch}"]
    cfg, _ = load_config(None, [*settings, f"data.num_workers={WORKERS}"])
    yield None
    data = build_data(cfg.data, 0)
    where = torch.device(device)
    loader = build_loader(cfg.data, data.train, data.preprocessing, where, 0, training=True)
    for epoch in range(1, EPOCHS + 1):
        yield loader.train_batches(epoch)


def torchvision(root: Path, batch: int, device: str) -> Iterator[Iterable | None]:
    """ImageFolder, transforms v2 and a DataLoader, as torchvision's documentation shows."""
    import torch
    from torch.utils.data import DataLoader
    from torchvision import datasets
    from torchvision.transforms import v2

    change = v2.Compose(
        [
            v2.RandomResizedCrop(SIDE, scale=SCALE, antialias=True),
            v2.RandomHorizontalFlip(),
            v2.ToImage(),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(MEAN, STD),
        ]
    )
    yield None
    loader = DataLoader(
        datasets.ImageFolder(root / "train", change),
        batch,
        shuffle=True,
        num_workers=WORKERS,
        persistent_workers=True,
        pin_memory=device != "cpu",
    )
    for _ in range(EPOCHS):
        yield loader


def timm(root: Path, batch: int, device: str) -> Iterator[Iterable | None]:
    """As its train.py does, which has no prefetcher on a CPU; the last batch is whole or dropped."""
    import torch
    from timm.data import create_dataset, create_loader

    yield None
    loader = create_loader(
        create_dataset("", root=str(root), split="train", is_training=True),
        (3, SIDE, SIDE),
        batch,
        is_training=True,
        scale=SCALE,
        color_jitter=None,
        interpolation="bilinear",
        num_workers=WORKERS,
        pin_memory=device != "cpu",
        use_prefetcher=device != "cpu",
        device=torch.device(device),
    )
    for _ in range(EPOCHS):
        yield loader


def ultralytics(root: Path, batch: int, device: str) -> Iterator[Iterable | None]:
    """As its ClassificationTrainer does with cache=disk, except that on a CPU this takes no workers.

    Decoded pictures go beside the files, as .npy. Its random changes but crop and flip are off.
    """
    from ultralytics.cfg import get_cfg
    from ultralytics.data import ClassificationDataset, build_dataloader

    settings = {"task": "classify", "imgsz": SIDE, "cache": "disk", "scale": 1 - SCALE[0]}
    settings |= {"fliplr": 0.5, "auto_augment": None, "erasing": 0.0}
    args = get_cfg(overrides=settings | {"hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0})
    yield None
    dataset = ClassificationDataset(root / "train", args, augment=True, prefix="train")
    loader = build_dataloader(dataset, batch, WORKERS, device=device)
    for _ in range(EPOCHS):
        yield ((found["img"], found["cls"]) for found in loader)


CONTESTANTS = {f.__name__: f for f in (ours, torchvision, timm, ultralytics)}


def build_step(device: str) -> Callable:
    """A step of resnet18 in fp32, the same for all: forward, backward, SGD; channels_last."""
    import torch
    import torch.nn.functional as F
    from torchvision.models import resnet18

    model = resnet18(num_classes=2).to(device, memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)

    def step(images: "torch.Tensor", labels: "torch.Tensor") -> None:
        images = images.contiguous(memory_format=torch.channels_last)
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        optimizer.step()

    return step


def run(epochs: Iterator, step: Callable | None, device: str) -> dict:
    import torch

    figures: dict = {"images": [], "seconds": [], "waited": [], "first_step": None}
    next(epochs)
    for _ in range(EPOCHS):
        began = asked = time.perf_counter()
        batches, images, waited = iter(next(epochs)), 0, 0.0
        for pixels, labels, *_ in batches:
            pixels, labels = (t.to(device, non_blocking=True) for t in (pixels, labels))
            waited += time.perf_counter() - asked
            images += len(labels)
            if step is not None:
                step(pixels, labels)
                figures["first_step"] = figures["first_step"] or time.time()
            asked = time.perf_counter()
        waited += time.perf_counter() - asked
        if device != "cpu":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - began
        for name, value in (("images", images), ("seconds", seconds), ("waited", waited)):
            figures[name].append(value)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("root", type=Path, metavar="FOLDER")
    parser.add_argument("--train", action="store_true", help="with steps of resnet18")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    import torchvision.transforms.v2  # noqa: F401  slow, and most import it late: counts for none

    from cnn.utils.memory import keep_freed_memory

    keep_freed_memory()
    step = build_step(args.device) if args.train else None
    epochs = CONTESTANTS[args.name](args.root, args.batch, args.device)
    print(json.dumps(run(epochs, step, args.device)), flush=True)


if __name__ == "__main__":
    main()
