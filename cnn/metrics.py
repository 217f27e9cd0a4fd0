"""Loss and accuracy from sums that stay on the device: one transfer where they are read."""

import math

import torch
from torch import nn


class Sums:
    """What an epoch's metrics are made of, image by image, so that a short batch weighs less."""

    def __init__(self, device: torch.device):
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss = torch.zeros((), dtype=exact, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.count = 0

    def add(self, loss: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds a batch: mean loss (), logits (N, classes), labels (N)."""
        number = len(labels)
        self.loss += loss.detach() * number
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.count += number

    def is_finite(self) -> bool:
        """Whether every loss so far was a number; waits for the device."""
        return math.isfinite(self.loss.item())

    def compute(self) -> dict[str, float]:
        """Mean loss and accuracy (a fraction) over the images so far."""
        count = max(self.count, 1)
        return {"loss": self.loss.item() / count, "acc": self.correct.item() / count}

    def state_dict(self) -> dict:
        return {"loss": self.loss, "correct": self.correct, "count": self.count}

    def load_state_dict(self, state: dict) -> None:
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.count = state["count"]


def improves(metric: str, value: float, best: float | None) -> bool:
    """Whether the value is better than the best so far; what is not a number never is."""
    if not math.isfinite(value):
        return False
    return best is None or (value < best if mode(metric) == "min" else value > best)


def mode(metric: str) -> str:
    """Which way the metric is better: min for losses, max for the rest."""
    return "min" if metric.endswith("loss") else "max"


def loss_of(function: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss in float32 at least, whatever precision the logits have."""
    return function(logits.float() if logits.dtype != torch.float64 else logits, labels)
