"""Runs drawn at random from every setting that touches exactness, each a command line of train.py.

Row i is a function of (seed, i) alone. Here too is the user's own code that rows name: a folder in
which one trains has a module `own` that hands it out.
"""

import csv
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from conftest import TINY
from PIL import Image
from torch import nn

from cnn.config import as_text
from cnn.config.settings import AUGMENTATIONS, MONITORED, OPTIMIZERS, SCHEDULES
from cnn.metrics.scores import OF_TWO_CLASSES

Settings = dict[str, Any]

# -- the user's own ------------------------------------------------------------------------------

OWN = """from matrix import Counting, Drawing, Moving, Untraceable
from matrix import Remembering, Tracking, Weighing, jitter
from torch.optim import Adadelta
"""


class Counting(nn.Module):
    """Takes images of any size; counts the passes of training, and computes with their number."""

    def __init__(self, num_classes: int, in_channels: int):
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU()
        )
        self.pool = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten())
        self.head = nn.Linear(32, num_classes)
        self.register_buffer("passes", torch.zeros((), dtype=torch.int64))

    def counts(self) -> bool:
        return self.training

    def forward(self, images: torch.Tensor) -> torch.Tensor:  # N, C, H, W
        if self.counts():
            self.passes += 1
        return self.head(self.pool(self.stem(images))) * (1 + self.passes.float().sin() / 4)


class Moving(Counting):
    """Counts every pass, those of evaluation too."""

    def counts(self) -> bool:
        return True


class Drawing(Counting):
    """Drops features in evaluation too."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = nn.functional.dropout(self.stem(images), 0.3, training=True)
        return self.head(self.pool(features))


class Untraceable(Counting):
    """Has no graph for TensorBoard."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        if torch.jit.is_tracing():
            raise RuntimeError("cannot be traced")
        return super().forward(images)


class Remembering(nn.Module):
    """A loss that moves with the labels that it has been trained on."""

    def __init__(self, rate: float = 0.3):
        super().__init__()
        self.rate = rate
        self.register_buffer("mean", torch.zeros(()))

    def moves(self) -> bool:
        return torch.is_grad_enabled()

    def forward(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if self.moves():
            self.mean.lerp_(labels.float().mean(), self.rate)
        return nn.functional.cross_entropy(logits, labels) * (1 + self.mean)


class Tracking(Remembering):
    """Moves with every label, those of evaluation too."""

    def moves(self) -> bool:
        return True


class Weighing(torch.optim.Optimizer):
    """Remembers a number, and tensors of other kinds than the weights, by parameter and by group."""

    def __init__(self, params: Any, lr: float, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "steps": 0})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            group["steps"] += 1
            for p in group["params"]:
                if p.grad is None:
                    continue
                held = self.state[p]
                if not held:
                    held |= {"mean": torch.zeros_like(p, dtype=torch.float64), "taken": 0}
                    held["signs"] = torch.zeros_like(p, dtype=torch.int64)
                held["taken"] += 1
                held["signs"] += p.grad.sign().long()
                held["mean"].lerp_(p.grad.double(), 1 / (1 + held["taken"] % 5))
                change = held["mean"] + 1e-3 * held["signs"] / group["steps"]
                p -= group["lr"] * (change.to(p.dtype) + group["weight_decay"] * p)


def jitter(image: torch.Tensor) -> torch.Tensor:
    """Draws from three generators: torch's, numpy's and Python's."""
    noise = torch.randn(image.shape) * np.random.uniform(0, 9) + random.uniform(-9, 9)
    return (image.float() + noise).clamp(0, 255).to(torch.uint8)


MOVES_IN_EVALUATION = ("own:Moving", "own:Tracking")

# -- what there is to draw from --------------------------------------------------------------------


@dataclass(frozen=True)
class Model:
    """What a model can take: sides of images, keywords; names in its first and last layers."""

    sides: tuple[int, ...]
    first: str
    last: str
    args: tuple[Settings, ...] = ({},)
    is_large: bool = False


MODELS = {
    "simple_cnn": Model(
        (8, 12), "^features.0", "classifier", ({"width": 4, "dropout": 0.4}, {"width": 6})
    ),
    "lenet5": Model((16, 28), "^features.0", "classifier.6", ({"dropout": 0.3}, {})),
    "resnet9": Model((16,), "^stem", "classifier", ({"width": 4}, {"width": 4, "scale": 0.5})),
    "resnet20": Model((8, 16), "^stem", "classifier", ({"width": 4, "blocks": 1},)),
    "squeezenet1_1": Model((32, 40), "^features.0", "classifier", ({"dropout": 0.3},), True),
    "mobilenet_v3_small": Model((32,), "^features.0", "classifier.3", ({"dropout": 0.3},), True),
    "shufflenet_v2_x0_5": Model((32, 48), "^conv1", "fc", ({},), True),
    "resnet18": Model((32,), "^(conv1|bn1)", "fc", ({},), True),
    **{
        f"own:{name}": Model((8, 12), "^stem.0", "head")
        for name in ("Counting", "Moving", "Drawing", "Untraceable")
    },
}
LIKELY = {"simple_cnn": 4, "resnet18": 0.3, "own:Counting": 2}  # against 1 of the others

# By optimizer: a learning rate at which nothing diverges, and keywords.
OPTIONS: dict[str, tuple[float, list[Settings]]] = {
    "sgd": (0.02, [{}, {"nesterov": True}, {"dampening": 0.3}]),
    "adam": (0.002, [{}, {"amsgrad": True}, {"betas": [0.8, 0.95], "foreach": True}]),
    "adamw": (0.002, [{}, {"amsgrad": True}, {"foreach": False}]),
    "nadam": (0.002, [{}, {"momentum_decay": 0.01, "decoupled_weight_decay": True}]),
    "radam": (0.002, [{}, {"decoupled_weight_decay": True}]),
    "rmsprop": (0.0005, [{}, {"centered": True, "alpha": 0.9}]),
    "adagrad": (0.01, [{}, {"lr_decay": 0.01, "initial_accumulator_value": 0.1}]),
    "adamax": (0.002, [{}, {"betas": [0.8, 0.95]}]),
    "own:Adadelta": (0.5, [{}, {"rho": 0.8}]),
    "own:Weighing": (0.02, [{}]),
}
assert OPTIONS.keys() >= set(OPTIMIZERS)


@dataclass(frozen=True)
class Row:
    """A run: its words on the command line, in so many processes.

    Attributes:
        classes: of images in files, where no setting tells their number.
        marks: what tells it from the others where it fails.
    """

    seed: int
    number: int
    words: tuple[str, ...]
    size: int
    classes: int
    marks: tuple[str, ...]

    def draw(self, use: str) -> random.Random:
        """What is random about one use of it."""
        return random.Random(f"{self.seed} {self.number} {use}")

    def prepare(self, folder: Path) -> None:
        """Puts the user's code into a folder in which it trains, and the images beside that."""
        folder.mkdir(parents=True)
        (folder / "own.py").write_text(OWN)
        photos = folder.parent / "photos"
        if any(word.startswith("data.root=") for word in self.words) and not photos.exists():
            write_photos(photos, self.draw("photos"), self.classes)


def is_of_two(monitor: str) -> bool:
    return monitor.removeprefix("val_") in OF_TWO_CLASSES and monitor != "val_auc"


def draw_row(seed: int, number: int) -> Row:
    """Row so-and-so; what is refused by design is drawn again."""
    draw = random.Random(f"{seed} {number}")
    while True:
        settings, size = draw_settings(draw), draw.choices((1, 2, 3), (7, 2, 1))[0]
        if is_taken(settings):
            words = [f"{key}={as_text(value)}" for key, value in settings.items()]
            classes = 2 if is_of_two(settings["checkpoint.monitor"]) else 3
            return Row(seed, number, (*TINY, *words), size, classes, marks_of(settings, size))


def marks_of(settings: Settings, size: int) -> tuple[str, ...]:
    """The kinds of it that have failed alone before."""
    code = {settings["model.name"], settings["loss.name"]}
    kinds = {
        f"{size} processes": size > 1,
        "moves in evaluation": bool(code & {*MOVES_IN_EVALUATION}),
        "own loss in several processes": size > 1 and settings["loss.name"] != "cross_entropy",
        "has no graph": "own:Untraceable" in code and settings["log.tensorboard"],
    }
    return tuple(kind for kind, is_so in kinds.items() if is_so)


def is_taken(settings: Settings) -> bool:
    """Whether the settings go together; else such a run is refused by design."""
    balanced = (settings["data.sampler"], settings.get("loss.class_weights"))
    return balanced != ("balanced", "balanced")


def draw_settings(draw: random.Random) -> Settings:
    """A value for each setting that matters, section by section."""
    settings: Settings = {"seed": draw.randrange(1000)}
    name = draw.choices(list(MODELS), [LIKELY.get(name, 1) for name in MODELS])[0]
    model, monitor = MODELS[name], draw.choice(MONITORED)
    settings |= draw_data(draw, draw.choice(model.sides), monitor)
    settings |= {"model.name": name, "model.args": draw.choice(model.args)}
    if model.is_large:  # the digits held out are many
        settings |= {"data.limit": 60, "data.val_fraction": 0.1}
    settings |= draw_loss(draw, settings)
    settings |= draw_optimizer(draw, model)
    settings |= draw_schedule(draw)
    settings |= {
        "train.epochs": 2 if model.is_large else draw.randint(4, 7),
        "train.precision": draw.choices(("fp32", "bf16", "fp16"), (5, 4, not model.is_large))[0],
        "train.accumulate": draw.choice((1, 1, 2, 3)),
        "train.ema_decay": draw.choice((None, 0.7, 0.95)),
        "train.clip_grad_norm": draw.choice((None, 0.5, 3.0)),
        "train.mixup": draw.choice((0, 0, 0.3)),
        "train.cutmix": draw.choice((0, 0, 1)),
        "train.early_stop_patience": draw.choice((None, None, None, 2, 3)),
        "checkpoint.monitor": monitor,
        "checkpoint.every_steps": draw.choice((None, 1, 2, 3)),
        "checkpoint.every_epochs": draw.choice((None, 1, 2)),
        "checkpoint.every_minutes": draw.choice((None, 0.002)),
        "log.report": draw.random() < 0.2 and not model.is_large,
        "log.tensorboard": draw.random() < 0.4,
    }
    return settings


def draw_data(draw: random.Random, side: int, monitor: str) -> Settings:
    """Images of that side, of as many classes as the metric is for."""
    kinds = ["synthetic", "folder", "csv", *([] if is_of_two(monitor) else ["digits"])]
    name, root = draw.choice(kinds), {}
    args, size, channels = {}, side, draw.choice((1, 3))
    if name == "synthetic":
        args = {"num_images": draw.randint(90, 180), "num_test": draw.randint(20, 60)}
        args |= {"num_classes": 2 if is_of_two(monitor) else draw.choice((2, 3, 5))}
        args |= {"image_size": side, "channels": channels, "noise": 60}
        size = draw.choice((None, side))
    elif name == "digits":
        size, channels = (draw.choice((None, 8)) if side == 8 else side), None
    else:
        root = {"data.root": "../photos" if name == "folder" else "../photos/table.csv"}
        channels = draw.choice((None, 1, 3))
    return {
        "data.name": name,
        **root,
        "data.args": args,
        "data.batch_size": draw.choice((8, 11, 16, 20)),
        "data.num_workers": draw.randint(0, 3),
        "data.val_fraction": draw.choice((0.2, 0.35, 0.5)),
        "data.limit": draw.randint(80, 150) if name == "digits" else draw.choice((None, 70)),
        "data.sampler": draw.choice(("shuffle", "shuffle", "balanced")),
        "data.image_size": size,
        "data.channels": channels,
        "data.augment": draw_augmentations(draw),
        "data.in_memory": draw.choice((True, False, "auto", "auto")),
    }


def draw_augmentations(draw: random.Random) -> list[str]:
    """Some of all, in any order."""
    names = [*AUGMENTATIONS, "own:jitter"]
    return draw.sample(names, draw.randint(0, min(4, len(names))))


def draw_loss(draw: random.Random, settings: Settings) -> Settings:
    name = draw.choices(("cross_entropy", "own:Remembering", "own:Tracking"), (7, 2, 1))[0]
    if name != "cross_entropy":
        return {"loss.name": name, "loss.args": draw.choice(({}, {"rate": 0.1}))}
    number = settings["data.args"].get("num_classes")
    by_class = [round(draw.uniform(0.3, 3), 2) for _ in range(number)] if number else "balanced"
    return {
        "loss.name": name,
        "loss.label_smoothing": draw.choice((0, 0.1, 0.3)),
        "loss.class_weights": draw.choice((None, "balanced", by_class)),
    }


def draw_optimizer(draw: random.Random, model: Model) -> Settings:
    name = draw.choice(list(OPTIONS))
    lr, args = OPTIONS[name]
    scale = draw.choice((0.1, 0.5, 0))
    which = draw.choice(({"match": model.last}, {"part": "head"}, {"part": "backbone"}))
    groups = draw.choice(([], [which | {"lr_scale": scale}]))
    freezes = draw.random() < 0.35
    return {
        "optim.name": name,
        "optim.lr": lr,
        "optim.momentum": draw.choice((0.5, 0.9)),
        "optim.weight_decay": draw.choice((0, 5e-4)),
        "optim.groups": groups,
        "optim.freeze": model.first if freezes else None,
        "optim.freeze_epochs": draw.randint(1, 2) if freezes else 0,
        "optim.args": draw.choice(args),
    }


def draw_schedule(draw: random.Random) -> Settings:
    return {
        "schedule.name": draw.choice(SCHEDULES),
        "schedule.warmup_epochs": draw.choice((0, 0.4, 1, 1.5)),
        "schedule.gamma": draw.choice((0.3, 0.7)),
        "schedule.step_epochs": draw.randint(1, 2),
        "schedule.milestones": sorted(draw.sample(range(1, 5), draw.randint(1, 2))),
        "schedule.patience": draw.randint(0, 1),
        "schedule.min_lr": draw.choice((0, 1e-5)),
    }


# -- images in files -------------------------------------------------------------------------------


def write_photos(root: Path, draw: random.Random, classes: int) -> None:
    """A class folder each with jpgs and pngs of several sizes, some gray; and a table of them."""
    rng = np.random.default_rng(draw.randrange(2**32))
    gray, is_split = draw.choice((0, 0.3, 1)), draw.random() < 0.5
    rows = []
    for number in range(draw.randint(75, 130)):
        label = f"class {number % classes}"
        shape = tuple(rng.integers(14, 30, 2)) + (() if rng.random() < gray else (3,))
        pixels = rng.integers(0, 120, shape) + 40 * (number % classes)
        path = Path(label, f"{number}.{draw.choice(('jpg', 'png'))}")
        (root / label).mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels.astype(np.uint8)).save(root / path)
        split = ("train", "train", "train", "val", "test")[number // classes % 5]
        rows.append((path, label, *([split] if is_split else [])))
    with open(root / "table.csv", "w", newline="") as file:
        csv.writer(file).writerows([("path", "label", "split")[: 2 + is_split], *rows])
