"""Loss, accuracy and more from sums that stay on the device: one transfer where they are read."""

import itertools
import math
from collections.abc import Callable, Sequence

import torch
from torch import nn

from cnn.metrics import scores
from cnn.metrics.scores import Metrics


class RunningMetrics:
    """What an epoch's metrics are made of, image by image, so that a short batch weighs less."""

    def __init__(self, device: torch.device):
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss = torch.zeros((), dtype=exact, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.weight: float | torch.Tensor = 0  # what the loss is divided by
        self.count: int | torch.Tensor = 0

    def add(
        self,
        loss: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weight: float | torch.Tensor | None = None,
    ) -> None:
        """Adds a batch: mean loss (), logits (N, classes), labels (N).

        Args:
            weight: of the batch in the mean loss, as `weight_of` gives it; None: its images.
        """
        number = len(labels)
        weight = number if weight is None else weight
        self.loss += loss.detach() * weight
        self.weight += weight
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.count += number

    def merge(self, other: "RunningMetrics") -> None:
        """Adds what other sums hold."""
        self.loss += other.loss
        self.correct += other.correct
        self.weight = self.weight + other.weight
        self.count = self.count + other.count

    def pack(self) -> torch.Tensor:
        """The four sums in one tensor, float64 (4)."""
        numbers = (self.loss, self.weight, self.correct, self.count)
        return torch.stack([torch.as_tensor(n).to(self.loss, non_blocking=True) for n in numbers])

    def unpack(self, total: torch.Tensor) -> None:
        """Takes over what `pack` gave, added up with that of other processes."""
        self.loss, self.weight, correct, count = total.unbind()
        self.correct, self.count = correct.to(torch.int64), count.to(torch.int64)

    def is_finite(self) -> bool:
        """Whether every loss so far was a number; waits for the device."""
        return math.isfinite(self.loss.item())

    def compute(self) -> dict[str, float]:
        """Mean loss and accuracy (a fraction) over the images so far."""
        count = int(self.count)
        weight = float(self.weight) if count else 1.0
        return {"loss": self.loss.item() / weight, "acc": self.correct.item() / max(count, 1)}

    def state_dict(self) -> dict:
        names = ("loss", "correct", "weight")
        return {name: getattr(self, name) for name in names} | {"count": int(self.count)}

    def load_state_dict(self, state: dict) -> None:
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.count = state["count"]
        weight = state.get("weight", self.count)  # not in files of before
        self.weight = weight.to(self.loss) if isinstance(weight, torch.Tensor) else int(weight)


class EvaluationMetrics(RunningMetrics):
    """An evaluation: besides the sums, the confusion matrix, and of each image what was said.

    What depends on the order of the batches is kept batch by batch, so that several processes that
    take them in turn come to the same bits as one.

    Args:
        names: of the metrics that `compute` gives; what they do not need is not kept.
    """

    def __init__(self, device: torch.device, num_classes: int, names: Sequence[str]):
        super().__init__(device)
        self.num_classes, self.names = num_classes, tuple(names)
        # A row a class as labelled, a column a class as predicted; flat, to be added to at once.
        self.matrix = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
        self.in_top = torch.zeros((), dtype=torch.int64, device=device)
        self._keeps_scores = bool(set(names) & set(scores.FROM_PROBABILITIES))
        self._losses: list[tuple[torch.Tensor, float | torch.Tensor]] = []  # times weight; weight
        self._labels: list[torch.Tensor] = []
        self._predictions: list[torch.Tensor] = []
        self._probabilities: list[torch.Tensor] = []  # of the class that was predicted
        self._scores: list[torch.Tensor] = []

    def add(
        self,
        loss: torch.Tensor,
        logits: torch.Tensor,
        labels: torch.Tensor,
        weight: float | torch.Tensor | None = None,
    ) -> None:
        """As `RunningMetrics.add`, and what was said of each image."""
        super().add(loss, logits, labels, weight)
        weight = len(labels) if weight is None else weight
        self._losses.append((loss.detach() * weight, weight))
        predictions = logits.argmax(1)
        probabilities = logits.float().softmax(1)  # N, classes
        cells = labels * self.num_classes + predictions
        self.matrix.index_add_(0, cells, torch.ones_like(cells))
        if scores.TOP_K_ACC in self.names:
            top = logits.topk(scores.TOP_K).indices  # N, 5
            self.in_top += (top == labels[:, None]).sum()
        self._predictions.append(predictions)
        self._probabilities.append(probabilities.gather(1, predictions[:, None])[:, 0])
        if self._keeps_scores:
            self._labels.append(labels)
            self._scores.append(probabilities)

    def gather(self, from_processes: Callable[[dict], list[dict]]) -> None:
        """Makes of each process's part, the batches that it took in its turn, the whole in every one.

        Args:
            from_processes: gives everybody's part for one's own.
        """
        lists = ("_losses", "_labels", "_predictions", "_probabilities", "_scores")
        counts = ("correct", "matrix", "in_top", "count")
        names = (*lists, *counts)
        parts = from_processes({name: _on_cpu(getattr(self, name)) for name in names})
        for name in lists:
            turns = itertools.zip_longest(*(part[name] for part in parts))
            setattr(self, name, [batch for turn in turns for batch in turn if batch is not None])
        for name in counts:
            setattr(self, name, sum(part[name] for part in parts))
        self.loss, self.weight = torch.zeros_like(self.loss, device="cpu"), 0
        for loss, weight in self._losses:
            self.loss += loss
            self.weight = self.weight + weight

    def compute(self) -> Metrics:
        """The named metrics over the images so far; None for what is undefined."""
        values = super().compute() | scores.from_confusion_matrix(self.confusion().numpy())
        values[scores.TOP_K_ACC] = self.in_top.item() / max(self.count, 1)
        if self._keeps_scores and self._scores:
            labels, given = torch.cat(self._labels).cpu(), torch.cat(self._scores).cpu()
            values |= scores.from_probabilities(labels.numpy(), given.numpy())
        return {name: values.get(name) for name in self.names}

    def confusion(self) -> torch.Tensor:
        """The confusion matrix, on the CPU: int64 (classes, classes)."""
        return self.matrix.view(self.num_classes, self.num_classes).cpu()

    def predictions(self) -> dict[str, torch.Tensor]:
        """Of each image, in the order they came: the class predicted, and its probability."""
        return {
            "prediction": torch.cat(self._predictions).to("cpu", torch.int32),
            "probability": torch.cat(self._probabilities).to("cpu", torch.float32),
        }


def loss_of(function: nn.Module, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """The loss in float32 at least, whatever precision the logits have."""
    return function(logits.float() if logits.dtype != torch.float64 else logits, labels)


def weight_of(function: nn.Module, labels: torch.Tensor) -> int | torch.Tensor:
    """What a batch weighs in the mean over several: its images, or the sum of their class weights.

    The mean is then the one that the loss would give of all the images at once, however they are
    divided into batches: with class weights, torch's divides by the sum of these, a float64 ().
    """
    weights = getattr(function, "weight", None)
    if not isinstance(function, nn.CrossEntropyLoss) or weights is None:
        return len(labels)
    exact = torch.float32 if weights.device.type == "mps" else torch.float64
    return weights.to(exact)[labels].sum()


def _on_cpu(value: object) -> object:
    """The same, its tensors on the CPU."""
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(part) for part in value)
    return value.cpu() if isinstance(value, torch.Tensor) else value
