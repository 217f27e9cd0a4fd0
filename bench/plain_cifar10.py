"""ResNet-20 on CIFAR-10 in a plain loop, with the settings of He et al. (2016, section 4.2).

    python bench/plain_cifar10.py photos/cifar10 --epochs 60

The folder has train/CLASS/*.jpg and test/CLASS/*.jpg. Network, files and validation images are those
of configs/cifar10.yaml; all else is the paper's: batches of 128, SGD at 0.1 with momentum 0.9 and
weight decay 1e-4 on all weights, a tenth of the rate after half and after three quarters of the steps,
a crop out of 4 added pixels and a flip. The paper's 164 epochs are shortened by --epochs. Each line of
the output is JSON.
"""

import argparse
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from torch.nn import functional as F
from torchvision.datasets import ImageFolder

from cnn.config import load_config
from cnn.datasets.build import build_data
from cnn.models.resnet import ResNet20

BATCH, PAD = 128, 4


def read(folder: Path) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
    """Reads the images (N, 3, 32, 32) in 0..1, their labels and their paths."""
    images = ImageFolder(folder)
    pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in images]))
    names = [path for path, _ in images.samples]
    return pixels.permute(0, 3, 1, 2) / 255, torch.tensor(images.targets), names


def augment(batch: torch.Tensor) -> torch.Tensor:
    """Moves each image by up to 4 pixels each way and flips half of them."""
    padded, side = F.pad(batch, (PAD,) * 4), batch.shape[-1]
    moved = torch.empty_like(batch)
    for i, (y, x) in enumerate(torch.randint(2 * PAD + 1, (len(batch), 2)).tolist()):
        moved[i] = padded[i, :, y : y + side, x : x + side]
    flipped = torch.rand(len(batch)) < 0.5
    moved[flipped] = moved[flipped].flip(-1)
    return moved


@torch.no_grad()
def accuracy(model: torch.nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        logits = torch.cat([model(batch) for batch in images.split(1000)])
    return (logits.argmax(1) == labels).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--epochs", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    cfg, _ = load_config(None, ["data.name=folder", f"data.root={args.folder}"])
    held_out = build_data(cfg.data, args.seed).val
    val_names = {held_out.name(i) for i in range(len(held_out))}

    images, labels, names = read(args.folder / "train")
    test_images, test_labels, _ = read(args.folder / "test")
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    images, test_images = (images - mean) / std, (test_images - mean) / std
    is_val = torch.tensor([name in val_names for name in names])
    assert is_val.sum() == len(val_names)
    val_images, val_labels = images[is_val], labels[is_val]
    images, labels = images[~is_val], labels[~is_val]

    torch.manual_seed(args.seed)
    model = ResNet20(10, 3).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9, weight_decay=1e-4)
    steps = args.epochs * (len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, [steps // 2, steps * 3 // 4])
    for epoch in range(1, args.epochs + 1):
        start, right = time.monotonic(), 0
        model.train()
        for indices in torch.randperm(len(images)).split(BATCH)[: steps // args.epochs]:
            batch = augment(images[indices]).contiguous(memory_format=torch.channels_last)
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(batch)
            loss = F.cross_entropy(logits.float(), labels[indices])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            right += (logits.argmax(1) == labels[indices]).sum().item()
        row = {"epoch": epoch, "train_acc": right / (steps // args.epochs * BATCH)}
        row |= {"val_acc": accuracy(model, val_images, val_labels)}
        print(json.dumps(row | {"seconds": time.monotonic() - start}), flush=True)
    print(json.dumps({"test_acc": accuracy(model, test_images, test_labels)}))


if __name__ == "__main__":
    main()
