"""The drill: says identical where a run can be stopped anywhere, and names the culprit where not."""

import signal
import sys
from pathlib import Path

import pytest

from cnn.drill import drill

EXAMPLES = """
import random
import time
import numpy as np
import torch
from torch import nn

class HiddenGenerator:
    '''A dataset that draws from a generator of its own.'''
    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.targets = [n % 3 for n in range(120)]
    def __len__(self):
        return len(self.targets)
    def __getitem__(self, index):
        label = self.targets[index]
        noise = self.rng.integers(0, 50, (8, 8, 1))
        return (noise + 60 * label).astype(np.uint8), label

def hidden_generator(root):
    return {"train": HiddenGenerator(), "classes": list("abc")}

def hash_order(root):
    '''A dataset that lists its files as a set does.'''
    names = list({f"img{n}" for n in range(120)})
    images = torch.stack([torch.full((1, 8, 8), int(name[3:]) / 200) for name in names])
    labels = torch.tensor([int(name[3:]) % 3 for name in names])
    return {"train": torch.utils.data.TensorDataset(images, labels), "classes": list("abc")}

def unseeded(library):
    '''A dataset that draws its images while it is built, and seeds nothing.'''
    def build(root):
        draw = {"torch": lambda: torch.rand(120, 1, 8, 8).numpy(),
                "numpy": lambda: np.random.rand(120, 1, 8, 8),
                "random": lambda: np.array([random.random() for _ in range(120 * 64)])}[library]
        images = torch.tensor(draw().reshape(120, 1, 8, 8), dtype=torch.float32)
        labels = torch.arange(120) % 3
        return {"train": torch.utils.data.TensorDataset(images, labels), "classes": list("abc")}
    return build

unseeded_torch, unseeded_numpy = unseeded("torch"), unseeded("numpy")
unseeded_random = unseeded("random")

class Counting(nn.Module):
    '''A model with state outside its state_dict.'''
    def __init__(self, num_classes, in_channels):
        super().__init__()
        self.layer = nn.Linear(in_channels * 64, num_classes)
        self.calls = 0
    def forward(self, images):
        self.calls += self.training
        return self.layer(images.flatten(1)) * (1 + 0.01 * self.calls)

class Unsure(nn.Linear):
    '''A model with Monte-Carlo dropout: it draws in validation too.'''
    def __init__(self, num_classes, in_channels):
        super().__init__(in_channels * 64, num_classes)
    def forward(self, images):
        return super().forward(nn.functional.dropout(images.flatten(1), 0.5, training=True))

class ForgetsInValidation(Unsure):
    '''It draws in validation, from a generator of its own.'''
    def __init__(self, num_classes, in_channels):
        super().__init__(num_classes, in_channels)
        self.rng = np.random.default_rng(0)
    def forward(self, images):
        scale = 1 if self.training else 1 + self.rng.random()
        return super().forward(images) * scale

class Forgets(torch.optim.SGD):
    '''An optimizer that remembers something outside its state.'''
    def step(self, closure=None):
        self.steps = getattr(self, "steps", 0) + 1
        for group in self.param_groups:
            for p in group["params"]:
                p.grad *= 1 + self.steps / 10
        super().step()

def by_the_clock(image):
    '''An augmentation that reads the clock.'''
    return image.roll(time.time_ns() // 1000 % 8, -1)
"""


@pytest.fixture(autouse=True)
def examples(folder_of_its_own, monkeypatch):
    Path("examples.py").write_text(EXAMPLES)
    monkeypatch.syspath_prepend(str(folder_of_its_own))
    yield
    sys.modules.pop("examples", None)


def test_the_drill_finds_nothing_in_a_run_that_resumes_exactly(train, capfd):
    rich = [
        "train.ema_decay=0.9",
        "train.accumulate=2",
        "data.num_workers=2",
        "train.precision=bf16",
    ]
    assert train("--drill", *rich) == 0
    said = capfd.readouterr().err
    assert "drill OK: identical" in said
    assert said.count("identical  identical  identical  identical  identical  identical") == 2


@pytest.mark.soak
def test_the_drill_finds_nothing_in_a_model_that_draws_while_it_validates(train, capfd):
    assert train("--drill", "model.name=examples:Unsure", "model.args={}", *MUCH_VALIDATION) == 0
    assert "drill OK: identical" in capfd.readouterr().err


@pytest.mark.soak
def test_the_drill_finds_nothing_in_a_balanced_run_whose_body_is_frozen_at_first(train, capfd):
    words = ["data.sampler=balanced", "data.in_memory=false", "data.num_workers=2"]
    words += ["optim.freeze=^features", "optim.freeze_epochs=1", "loss.class_weights=[1, 2, 5]"]
    assert train("--drill", *words, "train.accumulate=2") == 0
    assert "drill OK: identical" in capfd.readouterr().err


# 140 images to train on and as many to validate on; the drill uses 96 of each: six and two batches
MUCH_VALIDATION = [
    "data.args={num_images: 280, num_test: 20, num_classes: 3, image_size: 8, noise: 60}",
    "data.val_fraction=0.5",
]

AT_ONCE = (
    "a dataset with a generator of its own",
    "a model with state outside its state_dict",
    "an augmentation that reads the clock",
    "an optimizer that remembers outside its state",
)
CULPRITS = {
    "a dataset in the order of a set": (
        ["data.name=examples:hash_order", "data.args={}", "data.augment=[]"],
        "drill: a second, unbroken run is not the same: data order: ",
    ),
    **{
        f"a dataset that draws from {library} unseeded": (
            [f"data.name=examples:unseeded_{library}", "data.args={}", "data.augment=[]"],
            "drill: a second, unbroken run is not the same: data: ",
        )
        for library in ("torch", "numpy", "random")
    },
    "a model that draws in validation from a generator of its own": (
        ["model.name=examples:ForgetsInValidation", "model.args={}", *MUCH_VALIDATION],
        "drill: the stopped run is not the same: model randomness: at epoch 2, batch 6, in validation",
    ),
    "a dataset with a generator of its own": (
        ["data.name=examples:hidden_generator", "data.args={}", "data.augment=[]"],
        "drill: the stopped run is not the same: dataset: ",
    ),
    "a model with state outside its state_dict": (
        ["model.name=examples:Counting", "model.args={}"],
        "drill: the stopped run is not the same: model randomness: ",
    ),
    "an optimizer that remembers outside its state": (
        ["optim.name=examples:Forgets"],
        "drill: the stopped run is not the same: optimizer: at epoch 1, batch ",
    ),
    "an augmentation that reads the clock": (
        ["data.augment=[flip, examples:by_the_clock]"],
        "drill: a second, unbroken run is not the same: augmentation: ",
    ),
}


FEW_STOPS = ((1, 0.7, signal.SIGKILL), (2, 0.7, signal.SIGKILL))

# Each takes seconds: those that are caught by the same means as another one are left to the soak.
SOON = [
    pytest.param(*case, id=name, marks=[] if name in AT_ONCE else [pytest.mark.soak])
    for name, case in CULPRITS.items()
]


@pytest.mark.parametrize("settings, expected", SOON)
def test_the_drill_names(train, capfd, request, monkeypatch, settings, expected):
    if (
        request.node.callspec.id in AT_ONCE
    ):  # a stop is enough, and so are forks; all is tried above
        monkeypatch.setattr(drill, "STOPS", FEW_STOPS)
        monkeypatch.setattr(drill, "FRESH", drill.CONTEXT)
    assert train("--drill", *settings) == 1
    assert expected in capfd.readouterr().err


def test_it_stops_in_training_validation_and_test_by_either_signal():
    for number in (signal.SIGKILL, signal.SIGTERM):
        places = {(epoch, share) for epoch, share, by in drill.STOPS if by == number}
        assert {share for epoch, share in places if epoch <= drill.EPOCHS} >= {1.0}
        assert [share for epoch, share in places if epoch <= drill.EPOCHS and 0 < share < 1]
        assert (drill.EPOCHS + 1, 0.0) in places


def test_a_run_that_fails_by_itself_is_told_with_its_own_words(train, capfd):
    assert train("--drill", "data.augment=[examples:missing]") == 1
    said = capfd.readouterr().err
    assert "drill: the run itself failed" in said and "has no 'missing'" in said
