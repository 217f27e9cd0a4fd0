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
    """Running sums over images, from which the mean loss and the accuracy are computed.

    The sums are taken over images, so that a small batch counts less than a large one.

    Args:
        device: the device on which the sums are kept.

    Attributes:
        loss: the sum of the losses, a tensor (). A batch contributes its mean loss, multiplied by
            the weight of the batch.
        weight: the sum of the weights of the batches. The mean loss is `loss / weight`.
        correct: the number of images whose prediction equals the label, a tensor ().
        count: the number of images.
    """

    def __init__(self, device: torch.device):
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        self.loss = torch.zeros((), dtype=exact, device=device)
        self.correct = torch.zeros((), dtype=torch.int64, device=device)
        self.weight: float | Tensor = 0  # the divisor of the mean loss
        self.count: int | Tensor = 0

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, weight: Weight = None) -> None:
        """Adds a batch of N images to the sums.

        Args:
            loss: the mean loss of the batch, a tensor ().
            logits: the outputs of the model, a tensor (N, classes).
            labels: the class index of each image, a tensor (N).
            weight: the weight of this batch in the mean loss over all batches, as `weight_of`
                returns it. If None, the weight is N.
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
        """Returns loss, weight, correct and count, in this order, as one tensor of shape (4).

        The dtype is float64, or float32 on MPS.
        """
        sums = (getattr(self, name) for name in SUMS)
        return torch.stack([torch.as_tensor(s).to(self.loss, non_blocking=True) for s in sums])

    def unpack(self, total: Tensor) -> None:
        """Replaces the four sums by those in a tensor that `pack` returned.

        Args:
            total: a tensor of shape (4) that contains loss, weight, correct and count.
        """
        self.loss, self.weight, correct, count = total.unbind()
        self.correct, self.count = correct.to(torch.int64), count.to(torch.int64)

    def is_finite(self) -> bool:
        """Returns whether the sum of all losses so far is finite.

        Waits until the device has computed the sum.
        """
        return math.isfinite(self.loss.item())

    def compute(self) -> Metrics:
        """Returns the mean loss and the accuracy of all images so far.

        Waits until the device has computed the sums.

        Returns:
            A dict such as {"loss": 0.1, "acc": 0.98}. The accuracy is a fraction from 0 to 1. If no
            image has been added, both values are 0.
        """
        count = int(self.count)
        weight = float(self.weight) if count else 1.0
        return {"loss": self.loss.item() / weight, "acc": self.correct.item() / max(count, 1)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums under the names "loss", "weight", "correct" and "count".

        They are saved in a checkpoint.
        """
        return {name: getattr(self, name) for name in SUMS} | {"count": int(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores sums that `state_dict` returned.

        Args:
            state: the sums by name. Older checkpoints lack "weight". The weight is then set to the
                number of images.
        """
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.count = state["count"]
        weight = state.get("weight", self.count)
        self.weight = weight.to(self.loss) if isinstance(weight, Tensor) else int(weight)


class EvaluationMetrics(RunningMetrics):
    """Metrics of an evaluation: running sums, confusion matrix, and a prediction for each image.

    Losses and predictions are stored batch by batch. If several processes share the evaluation,
    their batches can thus be merged in order, and the metrics equal those of a single process.

    Args:
        device: the device of the logits.
        num_classes: the number of classes.
        names: the metrics that `compute` returns, such as "acc" and "auc". The probabilities of all
            classes are stored only if one of these metrics needs them.
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
        """Adds a batch of N images to the sums, and stores the prediction for each image.

        Args:
            loss: the mean loss of the batch, a tensor ().
            logits: the outputs of the model, a tensor (N, classes).
            labels: the class index of each image, a tensor (N).
            weight: the weight of this batch in the mean loss over all batches, as `weight_of`
                returns it. If None, the weight is N.
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
        """Merges the batches of all processes into this object.

        Every process has to call this method. Afterwards, all of them have the same metrics, and
        the batches are in the order 0, 1, 2 and so on. Of n processes, the one with rank r must
        have added the batches r, r + n, r + 2n and so on.

        Args:
            all_gather: a function that takes a value of this process and returns the list of the
                values of all processes, in the order of their ranks.
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
        """Returns the values of the metrics that were chosen when this object was created.

        Returns:
            A dict such as {"acc": 0.98, "auc": None}. The value of an undefined metric is None.
        """
        values = super().compute() | scores.from_confusion_matrix(self.confusion().numpy())
        values[scores.TOP_K_ACC] = self.in_top.item() / max(self.count, 1)
        if self._probabilities:
            labels = torch.cat(self._labels).cpu().numpy()
            values |= scores.from_probabilities(
                labels, torch.cat(self._probabilities).cpu().numpy()
            )
        return {name: values.get(name) for name in self.names}

    def confusion(self) -> Tensor:
        """Returns the confusion matrix, an int64 tensor (classes, classes) on the CPU.

        Rows are labels, columns are predictions.
        """
        return self.matrix.view(self.num_classes, self.num_classes).cpu()

    def predictions(self) -> dict[str, Tensor]:
        """Returns the predicted class of each image and the probability of this class.

        Returns:
            A dict of two tensors on the CPU: the class indices under "prediction", int32 (N), and
            the probabilities under "probability", float32 (N). N is the number of all images, which
            are in the order of the batches.
        """
        return {
            "prediction": torch.cat(self._predictions).to("cpu", torch.int32),
            "probability": torch.cat(self._confidences).to("cpu", torch.float32),
        }


def compute_loss(function: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the loss of a batch of N images, computed in float32.

    If the logits are float64, the loss is computed in float64.

    Args:
        function: the loss function.
        logits: the outputs of the model, a tensor (N, classes) of any float type.
        labels: the class index of each image, a tensor (N); or whatever labels the loss function
            takes.
    """
    return function(logits.float() if logits.dtype != torch.float64 else logits, labels)


def weight_of(function: nn.Module, labels: Tensor) -> int | Tensor:
    """Returns the weight of a batch in the mean loss over several batches.

    With these weights, the mean loss does not depend on how the images are divided into batches.

    Args:
        function: the loss function.
        labels: the class index of each image of the batch, a tensor (N).

    Returns:
        N, the number of images. Cross-entropy with class weights is an exception: torch divides the
        loss of a batch by the sum of the class weights of its images. This sum, a tensor (), is
        then returned.
    """
    weights = getattr(function, "weight", None)
    if not isinstance(function, nn.CrossEntropyLoss) or weights is None:
        return len(labels)
    exact = torch.float32 if weights.device.type == "mps" else torch.float64
    return weights.to(exact)[labels].sum()


def _on_cpu(value: object) -> object:
    """Returns a value with all tensors in it copied to the CPU.

    Args:
        value: a tensor, or nested lists and tuples that contain tensors. Any other value is
            returned as it is.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(_on_cpu(part) for part in value)
    return value.cpu() if isinstance(value, Tensor) else value
