"""One training run of throughput.py, in a process of its own: ours or one of the three peers.

    python bench/contestants.py NAME TASK WAY --steps 60 --root DATA

NAME is ours, plain (the loop of pytorch/examples), lightning or trainer (Hugging Face); WAY is
default or tuned (bf16 and channels_last; ours has one way only). The peers are written as their
documentation shows. Model, data, batch size, optimizer and augmentation are the same for all. The
last line of its output is JSON: when the first step was done, images a second after some steps,
and the process's peak memory.
"""

import argparse
import json
import logging
import os
import sys
import time
import warnings
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

BATCH = 128
WORKERS = 2
WARM = 10  # steps before the clock counts
LR, MOMENTUM = 0.05, 0.9


class Clock:
    """Notes when each step was done."""

    def __init__(self):
        self.times: list[float] = []

    def tick(self) -> None:
        self.times.append(time.time())  # not monotonic: another process knows when this one began

    def report(self) -> None:
        from bench.common import peak_megabytes

        seconds = self.times[-1] - self.times[WARM - 1]
        figures = {
            "first_step": self.times[0],
            "images_per_second": (len(self.times) - WARM) * BATCH / seconds,
            "peak_megabytes": peak_megabytes(),
            "steps": len(self.times),
        }
        print(json.dumps(figures), flush=True)


def ours(task: str, tuned: bool, steps: int, root: str, device: str) -> None:
    import train
    from cnn.utils import progress

    settings = {
        "mnist": ["data.name=mnist", "model.name=lenet5", "model.args={dropout: 0.25}"],
        "cifar": ["data.name=folder", "model.name=resnet9", "model.args={width: 32}"]
        + ["data.augment=[crop, flip]"],
    }[task]
    settings += [f"data.root={root}", f"data.limit={steps * BATCH}", f"data.batch_size={BATCH}"]
    settings += [f"optim.lr={LR}", f"optim.momentum={MOMENTUM}", "optim.weight_decay=0"]
    settings += ["loss.label_smoothing=0", "schedule.name=constant", "schedule.warmup_epochs=0"]
    settings += ["data.augment=[]"] if task == "mnist" else []
    clock, original = Clock(), progress.show_progress

    def timed(items, *args):
        for item in original(items, *args):
            clock.tick()
            yield item
        clock.report()
        os._exit(0)  # the epoch is trained; what comes after is not compared

    progress.show_progress = timed
    sys.exit(train.main([*settings, f"device={device}", "train.epochs=1", "log.report=false"]))


# -- the peers ----------------------------------------------------------------------------------


def build_model(task: str):
    from cnn.models.lenet5 import LeNet5
    from cnn.models.resnet import ResNet9

    if task == "mnist":
        return LeNet5(10, 1, dropout=0.25)
    return ResNet9(10, 3, width=32)


def build_dataset(task: str, steps: int, root: str):
    """torchvision's dataset and transforms, cut to so many steps."""
    import torch
    from torch.utils.data import Subset
    from torchvision import datasets, transforms

    if task == "mnist":
        change = [transforms.ToTensor(), transforms.Normalize((0.1307,), (0.3081,))]
        dataset = datasets.MNIST(root, train=True, transform=transforms.Compose(change))
    else:
        change = [
            transforms.RandomCrop(32, padding=4),
            transforms.RandomHorizontalFlip(),
            transforms.ToTensor(),
            transforms.Normalize((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
        ]
        dataset = datasets.ImageFolder(Path(root) / "train", transforms.Compose(change))
    order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0))
    return Subset(dataset, order[: steps * BATCH].tolist())  # of every class


def plain(task: str, tuned: bool, steps: int, root: str, device: str) -> None:
    """The loop of pytorch/examples, mnist/main.py and imagenet/main.py, written anew."""
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    loader = DataLoader(
        build_dataset(task, steps, root),
        batch_size=BATCH,
        shuffle=True,
        num_workers=WORKERS,
        pin_memory=device != "cpu",
    )
    form = torch.channels_last if tuned else torch.contiguous_format
    model = build_model(task).to(device, memory_format=form)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR, momentum=MOMENTUM)
    clock = Clock()
    model.train()
    for batch, (images, labels) in enumerate(loader):
        images = images.to(device, memory_format=form, non_blocking=True)
        labels = labels.to(device, non_blocking=True)
        optimizer.zero_grad()
        with torch.autocast(torch.device(device).type, torch.bfloat16, enabled=tuned):
            loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if batch % 10 == 0:
            print(f"{batch * BATCH} images  loss {loss.item():.6f}")
        clock.tick()
    clock.report()


def lightning(task: str, tuned: bool, steps: int, root: str, device: str) -> None:
    """As in Lightning's "Lightning in 15 minutes"; tuned as in its "N-Bit Precision"."""
    import lightning as L
    import torch
    import torch.nn.functional as F
    from torch.utils.data import DataLoader

    class Classifier(L.LightningModule):
        def __init__(self):
            super().__init__()
            self.model = build_model(task)
            if tuned:
                self.model = self.model.to(memory_format=torch.channels_last)

        def training_step(self, batch, batch_idx):
            images, labels = batch
            if tuned:
                images = images.contiguous(memory_format=torch.channels_last)
            loss = F.cross_entropy(self.model(images), labels)
            self.log("train_loss", loss)
            return loss

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=LR, momentum=MOMENTUM)

    clock = Clock()

    class Watch(L.Callback):
        def on_train_batch_end(self, *args):
            clock.tick()

    dataset = build_dataset(task, steps, root)
    loader = DataLoader(dataset, batch_size=BATCH, shuffle=True, num_workers=WORKERS)
    trainer = L.Trainer(
        max_epochs=1,
        accelerator="cpu" if device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed" if tuned else "32-true",
        callbacks=[Watch()],
    )
    trainer.fit(Classifier(), loader)
    clock.report()


def trainer(task: str, tuned: bool, steps: int, root: str, device: str) -> None:
    """As in the Hugging Face course: a model that gives its loss, a collator, a Trainer."""
    import torch
    import torch.nn.functional as F
    from transformers import Trainer, TrainerCallback, TrainingArguments

    class Classifier(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = build_model(task)

        def forward(self, pixel_values, labels=None):
            if tuned:
                pixel_values = pixel_values.contiguous(memory_format=torch.channels_last)
            logits = self.model(pixel_values)
            return {"loss": F.cross_entropy(logits.float(), labels), "logits": logits}

    def collate(items):
        images, labels = zip(*items)
        return {"pixel_values": torch.stack(images), "labels": torch.tensor(labels)}

    clock = Clock()

    class Watch(TrainerCallback):
        def on_step_end(self, *args, **keywords):
            clock.tick()

    model = Classifier()
    model = model.to(memory_format=torch.channels_last) if tuned else model
    args = TrainingArguments(
        output_dir="out",
        num_train_epochs=1,
        per_device_train_batch_size=BATCH,
        learning_rate=LR,
        lr_scheduler_type="constant",
        optim="sgd",
        optim_args=f"momentum={MOMENTUM}",
        dataloader_num_workers=WORKERS,
        remove_unused_columns=False,
        use_cpu=device == "cpu",
        bf16=tuned,
        save_strategy="no",  # it refuses to save weights that are channels_last
        report_to="none",
    )
    Trainer(
        model=model,
        args=args,
        data_collator=collate,
        train_dataset=build_dataset(task, steps, root),
        callbacks=[Watch()],
    ).train()
    clock.report()


CONTESTANTS = {"ours": ours, "plain": plain, "lightning": lightning, "trainer": trainer}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=CONTESTANTS)
    parser.add_argument("task", choices=["mnist", "cifar"])
    parser.add_argument("way", choices=["default", "tuned"])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--root", required=True, help="MNIST's parent, or the folder of CIFAR-10")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    if args.name != "ours":
        logging.disable(logging.WARNING)
    act = CONTESTANTS[args.name]
    act(args.task, args.way == "tuned", args.steps, args.root, args.device)


if __name__ == "__main__":
    main()
