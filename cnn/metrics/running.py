"""Running metrics: sums that stay on the device and are copied to the host only when read."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnn.metrics import scores
from cnn.metrics.scores import Metrics

Weight = float | Tensor | None

SUMS = ("loss", "weight", "correct", "count")


class RunningMetrics:
    """Sums over images, from which mean loss and accuracy are computed.

    Summing over images, rather than averaging over batches, gives a smaller last batch its smaller
    weight.

    Attributes:
        loss: sum over the batches of mean loss times weight, ().
        weight: sum of the weights of the batches, by which `loss` is divided.
        correct: count of images whose prediction equals the label, ().
        count: count of images.
    """

    def __init__(self, device: torch.device):
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss = torch.zeros((), dtype=exact, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.weight: float | Tensor = 0  # the divisor of the mean loss
        self.count: int | Tensor = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, weight: Weight = None) -> None:
        """Adds a batch of N images.

        Args:
            loss: mean over the batch, ().
            logits: (N, classes).
            labels: index of each image's class (N).
            weight: weight of this batch in the mean loss over several batches, from `weight_of`;
                None stands for N.
        """
        number = len(labels)
        weight = number if weight is None else weight
        self.loss += loss.detach() * weight
        self.weight += weight
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.count += number

    def merge(self, other: "RunningMetrics") -> None:
        """Adds the sums of another `RunningMetrics` to these sums, in place."""
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def pack(self) -> Tensor:
        """Returns the sums loss, weight, correct and count as one tensor (4).

        It is ready for an all-reduce. Its dtype is that of the summed loss: float64, or float32 on
        MPS.
        """
        sums = (getattr(self, name) for name in SUMS)
        return torch.stack([torch.as_tensor(s).to(self.loss, non_blocking=True) for s in sums])

    def unpack(self, total: Tensor) -> None:
        """Sets the sums loss, weight, correct and count from a tensor (4), as `pack` returns it."""
        self.loss, self.weight, correct, count = total.unbind()
        self.correct, self.count = correct.to(torch.int64), count.to(torch.int64)

    def is_finite(self) -> bool:
        """Returns whether the sum of the losses so far is finite; waits for the device."""
        return math.isfinite(self.loss.item())

    def compute(self) -> Metrics:
        """Returns the mean loss as "loss" and the accuracy as "acc", a fraction, of all images.

        Without images, both are 0. Waits for the device.
        """
        count = int(self.count)
        weight = float(self.weight) if count else 1.0
        return {"loss": self.loss.item() / weight, "acc": self.correct.item() / max(count, 1)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums by name, for a checkpoint."""
        return {name: getattr(self, name) for name in SUMS} | {"count": int(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Sets the sums from a result of `state_dict`.

        Where the weight is missing, as in older checkpoints, it is the number of images.
        """
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.count = state["count"]
        weight = state.get("weight", self.count)
        self.weight = weight.to(self.loss) if isinstance(weight, Tensor) else int(weight)


class EvaluationMetrics(RunningMetrics):
    """Metrics of an evaluation: running metrics, confusion matrix, and each prediction.

    What depends on the order of the batches is stored as one list entry per batch. So several
    processes that evaluate batches in turn compute the same bits as a single process.

    Args:
        device: where the logits are.
        num_classes: number of classes.
        names: the metrics that `compute` returns, such as "acc" and "auc". Probabilities of all
            classes are stored only if one of the metrics needs them.
    """

    PER_BATCH = ("_losses", "_labels", "_predictions", "_confidences", "_probabilities")
    COUNTS = ("correct", "matrix", "in_top", "count")

    def __init__(self, device: torch.device, num_classes: int, names: Sequence[str]):
        super().__init__(device)
        self.num_classes, self.names = num_classes, tuple(names)
        # Rows are labels, columns are predictions; flat, since index_add_ needs one dimension.
        self.matrix = torch.zeros(num_classes**2, dtype=torch.int64, device=device)
        self.in_top = torch.zeros((), dtype=torch.int64, device=device)
        self._needs_probabilities = bool(set(names) & set(scores.FROM_PROBABILITIES))
        self._losses: list[tuple[Tensor, float | Tensor]] = []  # loss * weight, weight
        self._labels: list[Tensor] = []
        self._predictions: list[Tensor] = []
        self._confidences: list[Tensor] = []  # probabilities of the predicted classes
        self._probabilities: list[Tensor] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, weight: Weight = None) -> None:
        """Adds a batch of N images, and the prediction for each of them.

        Args:
            loss: mean over the batch, ().
            logits: (N, classes).
            labels: index of each image's class (N).
            weight: weight of this batch in the mean loss over several batches, from `weight_of`;
                None stands for N.
        """
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
        self._confidences.append(probabilities.gather(1, predictions[:, None])[:, 0])
        if self._needs_probabilities:
            self._labels.append(labels)
            self._probabilities.append(probabilities)

    def gather(self, all_gather: Callable[[dict], list[dict]]) -> None:
        """Merges the batches of all processes, in place, so that all have the same metrics.

        Restores the order of the batches, which the processes evaluated in turn.

        Args:
            all_gather: takes the value of this process, and returns the list of the values of all
                processes.
        """
        names = self.PER_BATCH + self.COUNTS
        parts = all_gather({name: _on_cpu(getattr(self, name)) for name in names})
        for name in self.PER_BATCH:
            turns = itertools.zip_longest(*(part[name] for part in parts))
            setattr(self, name, [batch for turn in turns for batch in turn if batch is not None])
        for name in self.COUNTS:
            setattr(self, name, sum(part[name] for part in parts))
        self.loss, self.weight = torch.zeros_like(self.loss, device="cpu"), 0
        for loss, weight in self._losses:
            self.loss += loss
            self.weight = self.weight + weight

    def compute(self) -> Metrics:
        """Returns the metrics listed in `names`, by name; an undefined metric is None."""
        values = super().compute() | scores.from_confusion_matrix(self.confusion().numpy())
        values[scores.TOP_K_ACC] = self.in_top.item() / max(self.count, 1)
        if self._probabilities:
            labels = torch.cat(self._labels).cpu().numpy()
            values |= scores.from_probabilities(
                labels, torch.cat(self._probabilities).cpu().numpy()
            )
        return {name: values.get(name) for name in self.names}

    def confusion(self) -> Tensor:
        """Returns the confusion matrix on the CPU, int64 (classes, classes).

        Rows are labels, columns are predictions.
        """
        return self.matrix.view(self.num_classes, self.num_classes).cpu()

    def predictions(self) -> dict[str, Tensor]:
        """Returns the predicted class of each image and its probability, on the CPU.

        Returns:
            "prediction", int32 (N), and "probability", float32 (N), in the order of the batches.
        """
        return {
            "prediction": torch.cat(self._predictions).to("cpu", torch.int32),
            "probability": torch.cat(self._confidences).to("cpu", torch.float32),
        }


def compute_loss(function: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of a batch, computed in float32, or in float64 if the logits are float64.

    Args:
        function: the loss function.
        logits: (N, classes), of any float type.
        labels: (N), or in the form that the loss function takes.
    """
    return function(logits.float() if logits.dtype != torch.float64 else logits, labels)


def weight_of(function: nn.Module, labels: Tensor) -> int | Tensor:
    """Returns the weight of a batch in the mean loss over several batches.

    This is the number of images. For cross-entropy with class weights it is the sum of the class
    weights of the images, a tensor (), since torch divides by it. With these weights, the mean loss
    does not depend on how the images are divided into batches.

    Args:
        function: the loss function.
        labels: index of each image's class (N).
    """
    weights = getattr(function, "weight", None)
    if not isinstance(function, nn.CrossEntropyLoss) or weights is None:
        return len(labels)
    exact = torch.float32 if weights.device.type == "mps" else torch.float64
    return weights.to(exact)[labels].sum()


def _on_cpu(value: object) -> object:
    """Copies a tensor, or all tensors in nested lists and tuples, to the CPU.

    Returns any other value unchanged.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(part) for part in value)
    return value.cpu() if isinstance(value, Tensor) else value
