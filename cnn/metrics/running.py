"""Running metrics: sums that stay on the device and are copied to the host only when read."""

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from cnn.metrics import scores
from cnn.metrics.calibration import scaled
from cnn.metrics.scores import Metrics

Weight = float | Tensor | None

SUMS = ("loss", "weight", "correct", "count")


class RunningMetrics:
    """Running sums from which the mean loss and the accuracy are computed.

    The sums are taken over images. A small batch thus counts less than a large batch.

    Args:
        device: the device on which the sums are kept.

    Attributes:
        loss: the sum of the losses, a tensor (). A batch adds its mean loss times its weight.
        weight: the sum of the weights of the batches. The mean loss of all images is `loss /
            weight`.
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
            weight: the weight of the batch in the mean loss over all batches. None means the weight
                N.
        """
        number = len(labels)
        weight = number if weight is None else weight
        self.loss += loss.detach() * weight
        self.weight += weight
        self.correct += (logits.detach().argmax(1) == labels).sum()
        self.count += number

    def merge(self, other: "RunningMetrics") -> None:
        """Adds the sums of another object to the sums of this object, in place.

        Args:
            other: the other object, which does not change.
        """
        for name in SUMS:
            setattr(self, name, getattr(self, name) + getattr(other, name))

    def pack(self) -> Tensor:
        """Returns loss, weight, correct and count as one tensor of shape (4).

        The dtype is float64, or float32 if the device is MPS.
        """
        sums = (getattr(self, name) for name in SUMS)
        return torch.stack([torch.as_tensor(s).to(self.loss, non_blocking=True) for s in sums])

    def unpack(self, total: Tensor) -> None:
        """Replaces the four sums by the values in a tensor.

        Args:
            total: a tensor (4) of loss, weight, correct and count, in this order.
        """
        self.loss, self.weight, correct, count = total.unbind()
        self.correct, self.count = correct.to(torch.int64), count.to(torch.int64)

    def is_finite(self) -> bool:
        """Returns whether the sum of all losses so far is finite.

        The call waits until the device has computed the sum.
        """
        return math.isfinite(self.loss.item())

    def compute(self) -> Metrics:
        """Returns the mean loss and the accuracy of all images so far.

        The call waits until the device has computed the sums.

        Returns:
            A dict such as {"loss": 0.1, "acc": 0.98}. The accuracy is a fraction from 0 to 1. Both
            values are 0 if no image has been added.
        """
        count = int(self.count)
        weight = float(self.weight) if count else 1.0
        return {"loss": self.loss.item() / weight, "acc": self.correct.item() / max(count, 1)}

    def state_dict(self) -> dict[str, Any]:
        """Returns the sums for a checkpoint.

        Returns:
            A dict with the keys "loss", "weight", "correct" and "count".
        """
        return {name: getattr(self, name) for name in SUMS} | {"count": int(self.count)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores sums from a checkpoint.

        Args:
            state: a dict that `state_dict` returned. The key "weight" is missing in older
                checkpoints. The weight is then set to the number of images.
        """
        self.loss.copy_(state["loss"])
        self.correct.copy_(state["correct"])
        self.count = state["count"]
        weight = state.get("weight", self.count)
        self.weight = weight.to(self.loss) if isinstance(weight, Tensor) else int(weight)


class EvaluationMetrics(RunningMetrics):
    """Metrics of an evaluation: running sums, confusion matrix, and a prediction for each image.

    Losses and predictions are stored for each batch. The batches of several processes can thus be
    merged in their original order. The metrics then equal those of a single process.

    Args:
        device: the device of the logits.
        num_classes: the number of classes.
        names: the metrics that `compute` returns, such as "acc" and "auc".
        keeps_probabilities: whether `predictions` returns the probabilities of all classes. They
            are stored only for this, or if a chosen metric needs them.
        temperature: divides the logits before the softmax.
    """

    def __init__(
        self,
        device: torch.device,
        num_classes: int,
        names: Sequence[str],
        *,
        keeps_probabilities: bool = False,
        temperature: float = 1.0,
    ):
        super().__init__(device)
        self.num_classes, self.names = num_classes, tuple(names)
        self.keeps_probabilities, self.temperature = keeps_probabilities, temperature
        self._batches: list[dict[str, Any]] = []

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor, weight: Weight = None) -> None:
        """Adds a batch of N images to the sums, and stores their predictions.

        Args:
            loss: the mean loss of the batch, a tensor ().
            logits: the outputs of the model, a tensor (N, classes).
            labels: the class index of each image, a tensor (N).
            weight: the weight of the batch in the mean loss over all batches. None means the weight
                N.
        """
        super().add(loss, logits, labels, weight)
        weight = len(labels) if weight is None else weight
        probabilities = (logits.float() / self.temperature).softmax(1)  # N, classes
        predictions = logits.argmax(1)
        batch = {
            "loss": loss.detach() * weight,
            "weight": weight,
            # The index of a cell of the confusion matrix contains the label and the prediction.
            "cells": labels * self.num_classes + predictions,
            "confidences": probabilities.gather(1, predictions[:, None])[:, 0],
        }
        if scores.TOP_K_ACC in self.names:
            top = logits.topk(scores.TOP_K).indices  # N, 5
            batch["is_in_top"] = (top == labels[:, None]).any(1)
        if self.keeps_probabilities or set(self.names) & set(scores.FROM_PROBABILITIES):
            batch["probabilities"] = probabilities
        self._batches.append(batch)

    def gather(self, all_gather: Callable[[list], list[list]]) -> None:
        """Merges the batches of all processes into the object of every process.

        Every process has to call this method. Of n processes, the process with rank r must have
        added the batches r, r + n, r + 2n and so on. Afterwards, the batches are in the order 0, 1,
        2 and so on.

        Args:
            all_gather: a function that collects one value from each process. The function takes the
                value of this process. The function returns a list of the values of all processes,
                ordered by rank.
        """
        own = [
            {name: torch.as_tensor(value).cpu() for name, value in batch.items()}
            for batch in self._batches
        ]
        turns = itertools.zip_longest(*all_gather(own))
        self._batches = [batch for turn in turns for batch in turn if batch is not None]
        matrix = self.confusion()
        self.correct, self.count = matrix.trace(), matrix.sum()
        self.loss, self.weight = torch.zeros_like(self.loss, device="cpu"), 0
        for batch in self._batches:
            self.loss += batch["loss"]
            self.weight = self.weight + batch["weight"]

    def compute(self) -> Metrics:
        """Returns the values of the metrics that the constructor received.

        Returns:
            A dict such as {"acc": 0.98, "auc": None}. None means that the metric is undefined. With
            a temperature, "log_loss_before" and "ece_before" are the metrics without.
        """
        values = super().compute() | scores.from_confusion_matrix(self.confusion().numpy())
        if "is_in_top" in self._batches[0]:
            values[scores.TOP_K_ACC] = self._per_image("is_in_top").numpy().mean().item()
        if set(self.names) & set(scores.FROM_PROBABILITIES):
            labels = self._per_image("cells") // self.num_classes
            probabilities = self._per_image("probabilities")
            labels, probabilities = labels.numpy(), probabilities.numpy()
            values |= scores.from_probabilities(labels, probabilities)
        chosen = {name: values.get(name) for name in self.names}
        if self.temperature != 1 and "ece" in chosen:
            without = scores.from_probabilities(labels, scaled(probabilities, 1 / self.temperature))
            chosen |= {f"{name}_before": without[name] for name in ("log_loss", "ece")}
        return chosen

    def _per_image(self, name: str) -> Tensor:
        return torch.cat([batch[name] for batch in self._batches]).cpu()

    def confusion(self) -> Tensor:
        """Returns the confusion matrix, an int64 tensor (classes, classes) on the CPU.

        Rows are labels, columns are predictions.
        """
        number = self.num_classes
        return self._per_image("cells").bincount(minlength=number**2).view(number, number)

    def predictions(self) -> dict[str, Tensor]:
        """Returns the predicted class of each image, and probabilities.

        Returns:
            A dict of tensors on the CPU. The class indices are under "prediction", an int32 tensor
            (N). Their probabilities are under "probability", a float32 tensor (N). N is the number
            of all images. The images are in the order of the batches. If `keeps_probabilities` is
            set, those of all classes are under "probabilities", a float32 tensor (N, classes).
        """
        found = {
            "prediction": (self._per_image("cells") % self.num_classes).to(torch.int32),
            "probability": self._per_image("confidences"),
        }
        if self.keeps_probabilities:
            found["probabilities"] = self._per_image("probabilities")
        return found


def compute_loss(function: nn.Module, logits: Tensor, labels: Tensor) -> Tensor:
    """Returns the mean loss of a batch of N images.

    The loss is computed in float64 for float64 logits, and in float32 for all other logits.

    Args:
        function: the loss function.
        logits: the outputs of the model, a tensor (N, classes) of any float type.
        labels: the class index of each image, a tensor (N). Another form is permitted if the loss
            function takes that form.
    """
    return function(logits.float() if logits.dtype != torch.float64 else logits, labels)


def weight_of(function: nn.Module, labels: Tensor) -> int | Tensor:
    """Returns the weight of a batch in the mean loss over several batches.

    With these weights, the mean loss does not depend on how the images are divided into batches.

    Args:
        function: the loss function.
        labels: the class index of each image of the batch, a tensor (N).

    Returns:
        The number of images N. For cross-entropy with class weights, the result is a tensor (). The
        tensor contains the sum of the class weights of the N images. Torch divides the loss of the
        batch by the same sum.
    """
    weights = getattr(function, "weight", None)
    if not isinstance(function, nn.CrossEntropyLoss) or weights is None:
        return len(labels)
    exact = torch.float32 if weights.device.type == "mps" else torch.float64
    return weights.to(exact)[labels].sum()
