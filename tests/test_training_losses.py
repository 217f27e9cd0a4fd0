"""A loss of one's own is tried before the first epoch: what cannot learn classes is refused."""

import numpy as np
import pytest
from torch import nn

from cnn.config import LossConfig
from cnn.errors import Refused
from cnn.training.losses import build_loss

TAKE_CLASSES = {"CrossEntropyLoss", "MultiMarginLoss"}  # logits and the index of a class
OF_TORCH = [name for name in dir(nn) if name.endswith("Loss")]
FUNCTIONS = ["mse_loss", "binary_cross_entropy", "binary_cross_entropy_with_logits", "nll_loss"]


def build(name: str, number: int, **args):
    classes = [str(k) for k in range(number)]
    return build_loss(LossConfig(name, args=args), np.arange(number), classes)


@pytest.mark.parametrize("number", [2, 3, 10])
@pytest.mark.parametrize("name", OF_TORCH)
def test_of_torchs_losses_those_of_classes_are_taken(name, number):
    if name in TAKE_CLASSES:
        build(f"torch.nn:{name}", number)
        return
    with pytest.raises(Refused, match=r"^loss\.(name|args): ") as refusal:
        build(f"torch.nn:{name}", number)
    if str(refusal.value).startswith("loss.name"):
        assert "cross_entropy fits" in str(refusal.value)


@pytest.mark.parametrize("number", [2, 3, 10])
@pytest.mark.parametrize("name", [*FUNCTIONS, "hinge_embedding_loss", "softmax"])
def test_functions_are_tried_too(name, number):
    with pytest.raises(Refused, match=f"^loss.name: torch.nn.functional:{name}"):
        build(f"torch.nn.functional:{name}", number)


def test_a_loss_per_image_is_refused_with_what_gives_the_mean():
    with pytest.raises(Refused, match=r"the mean loss \(\) .*reduction: mean.* got \(2,\)"):
        build("torch.nn:CrossEntropyLoss", 3, reduction="none")


def test_a_trial_leaves_no_trace_in_the_loss(monkeypatch):
    monkeypatch.syspath_prepend(".")
    with open("counting.py", "w") as file:
        file.write(
            "import torch\n"
            "from torch import nn\n"
            "class Counting(nn.CrossEntropyLoss):\n"
            "    def __init__(self):\n"
            "        super().__init__()\n"
            "        self.register_buffer('calls', torch.zeros(()))\n"
            "    def forward(self, logits, labels):\n"
            "        self.calls += 1\n"
            "        return super().forward(logits, labels)\n"
        )
    assert build("counting:Counting", 3).calls == 0


def test_a_run_is_refused_before_the_first_epoch(train, capfd):
    assert train("loss.name=torch.nn:MSELoss") == 2
    said = capfd.readouterr().err
    assert "loss.name: torch.nn:MSELoss does not take logits (2, 3)" in said
    assert "Traceback" not in said and "epoch 1" not in said


LAZY = """
import torch
from torch import nn

class Lazy(nn.CrossEntropyLoss):
    def __init__(self):
        super().__init__()
        self.calls, self.mean = 0, None

    def forward(self, logits, labels):
        self.calls += 1
        self.mean = logits.mean().detach() if self.mean is None else self.mean
        return super().forward(logits, labels)

def negative(logits, labels):
    return -torch.softmax(logits, 1).gather(1, labels[:, None]).mean()
"""


def test_what_a_loss_makes_in_its_first_call_is_made_in_training(monkeypatch):
    monkeypatch.syspath_prepend(".")
    with open("lazy_loss.py", "w") as file:
        file.write(LAZY)
    loss = build("lazy_loss:Lazy", 3)
    assert loss.calls == 0 and loss.mean is None
    build("lazy_loss:negative", 3)  # a loss may be below 0
