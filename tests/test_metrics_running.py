"""Loss and accuracy over images, whatever the batches; what counts as better; loss weights."""

import contextlib
import math
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F

from cnn.config import Config, LossConfig, ScheduleConfig, with_values
from cnn.errors import Refused
from cnn.metrics.running import RunningMetrics, compute_loss, weight_of
from cnn.metrics.scores import improves
from cnn.training.distributed import ALONE
from cnn.training.engine import train_one_epoch
from cnn.training.losses import build_loss
from cnn.training.schedule import Schedule
from cnn.training.state import TrainingState

CPU = torch.device("cpu")


def random_outputs(number=23, classes=5):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(number, classes, generator=generator)
    return logits, torch.randint(classes, (number,), generator=generator)


@pytest.mark.parametrize("sizes", [[23], [10, 10, 3], [1] * 23, [22, 1]])
def test_the_metrics_are_plain_means_over_the_images_whatever_the_batches(sizes):
    logits, labels = random_outputs()
    sums = RunningMetrics(CPU)
    for some, of_them in zip(logits.split(sizes), labels.split(sizes)):
        sums.add(F.cross_entropy(some, of_them), some, of_them)
    result = sums.compute()
    assert result["loss"] == pytest.approx(F.cross_entropy(logits.double(), labels).item(), 1e-6)
    assert result["acc"] == np.mean(logits.argmax(1).numpy() == labels.numpy())
    assert 0 < result["acc"] < 1


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("sizes", [[23], [10, 10, 3], [1] * 23])
def test_a_weighted_loss_is_that_of_all_images_at_once_whatever_the_batches(sizes, smoothing):
    logits, labels = random_outputs()
    weights = [0.2, 1.0, 5.0, 0.7, 2.0]
    cfg = LossConfig(class_weights=weights, label_smoothing=smoothing)
    loss = build_loss(cfg, labels.numpy(), list("abcde"))
    sums = RunningMetrics(CPU)
    for some, of_them in zip(logits.split(sizes), labels.split(sizes)):
        sums.add(loss(some, of_them), some, of_them, weight_of(loss, of_them))
    options = {"weight": torch.tensor(weights).double(), "label_smoothing": smoothing}
    expected = F.cross_entropy(logits.double(), labels, **options).item()
    assert sums.compute()["loss"] == pytest.approx(expected, 1e-6)
    again = RunningMetrics(CPU)
    again.load_state_dict(sums.state_dict())
    assert again.compute() == sums.compute()


def step_over(images: torch.Tensor, labels: torch.Tensor, sizes: list[int], loss) -> torch.Tensor:
    """The weights of a small model after one step over the images, in batches of such sizes."""
    batches = zip(images.split(sizes[0]), labels.split(sizes[0]), sizes)
    weight, steps = step_through(batches, loss)
    assert steps == [len(sizes)]
    return weight


def step_through(batches, loss, accumulate: int = 3) -> tuple[torch.Tensor, list[int]]:
    """The weights of a small model that was trained on the batches, and the batches in each step."""
    model = torch.nn.Linear(5, 5)
    torch.nn.init.zeros_(model.weight), torch.nn.init.zeros_(model.bias)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    schedule = Schedule(ScheduleConfig("constant"), optimizer, 1, 1, "min")
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    run = SimpleNamespace(
        cfg=with_values(Config(), train={"accumulate": accumulate}),
        state=TrainingState(model, optimizer, schedule, scaler, CPU),
        train_model=model,
        loss=loss,
        group=ALONE,
        autocast=contextlib.nullcontext,
    )
    steps = list(train_one_epoch(run, batches))
    return model.weight, steps


def test_the_batches_of_a_step_are_freed_before_the_next_are_loaded():
    alive, most = weakref.WeakSet(), []

    def batches():
        for _ in range(6):
            images = torch.randn(4, 5)
            alive.add(images)
            most.append(len(alive))
            yield images, torch.zeros(4, dtype=torch.int64), 4
            del images

    _, steps = step_through(batches(), torch.nn.CrossEntropyLoss(), accumulate=2)
    assert steps == [2, 2, 2] and max(most) == 2


@pytest.mark.parametrize("weights", [None, [0.2, 1.0, 5.0, 0.7, 2.0]], ids=["plain", "weighted"])
def test_a_step_over_several_batches_is_that_of_one_large_batch(weights):
    images, labels = random_outputs()
    loss = build_loss(LossConfig(class_weights=weights), labels.numpy(), list("abcde"))
    whole = step_over(images, labels, [23], loss)
    torch.testing.assert_close(step_over(images, labels, [10, 10, 3], loss), whole)


def test_a_batch_that_has_lost_an_image_weighs_what_is_left():
    images, labels = (tensor[:22] for tensor in random_outputs())
    left, planned = (
        step_over(images, labels, [size], torch.nn.CrossEntropyLoss()) for size in (22, 23)
    )
    assert torch.equal(left, planned)


def test_sums_of_a_file_of_before_go_on_as_plain_means():
    logits, labels = random_outputs()
    first, second = RunningMetrics(CPU), RunningMetrics(CPU)
    first.add(F.cross_entropy(logits, labels), logits, labels)
    saved = first.state_dict()
    del saved["weight"]
    second.load_state_dict(saved)
    assert second.compute() == first.compute()


def test_sums_go_on_from_their_saved_state():
    logits, labels = random_outputs()
    loss = F.cross_entropy(logits, labels)
    first, second = RunningMetrics(CPU), RunningMetrics(CPU)
    first.add(loss, logits, labels)
    second.load_state_dict(first.state_dict())
    for sums in (first, second):
        sums.add(loss / 3, -logits, labels)
    assert second.compute() == first.compute() and second.count == 46


def test_no_images_give_zeros_and_a_loss_that_is_not_finite_shows():
    sums = RunningMetrics(CPU)
    assert sums.compute() == {"loss": 0.0, "acc": 0.0} and sums.is_finite()
    logits, labels = random_outputs()
    sums.add(torch.tensor(math.inf), logits, labels)
    assert not sums.is_finite()


@pytest.mark.parametrize(
    "metric, value, best, expected",
    [
        ("val_acc", 0.9, 0.8, True),
        ("val_acc", 0.8, 0.8, False),
        ("val_acc", 0.7, 0.8, False),
        ("val_loss", 0.7, 0.8, True),
        ("val_loss", 0.8, 0.8, False),
        ("val_loss", 0.9, 0.8, False),
        ("val_loss", 9.0, None, True),
        ("val_acc", 0.0, None, True),
        ("val_loss", math.nan, None, False),
        ("val_loss", -math.inf, 0.8, False),
        ("val_acc", math.nan, 0.8, False),
    ],
)
def test_better_is_lower_for_a_loss_higher_for_the_rest_and_never_nan(
    metric, value, best, expected
):
    assert improves(metric, value, best) is expected


def test_balanced_class_weights_are_those_of_scikit_learn():
    labels = np.array([0] * 7 + [1] * 2 + [2] * 3)
    loss = build_loss(LossConfig(class_weights="balanced"), labels, ["a", "b", "c"])
    expected = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    np.testing.assert_allclose(loss.weight, expected, rtol=1e-6)


def test_a_class_without_images_leaves_balanced_weights_finite():
    loss = build_loss(LossConfig(class_weights="balanced"), np.array([0, 0, 1]), ["a", "b", "c"])
    assert loss.weight.isfinite().all()


def test_class_weights_given_are_one_a_class():
    labels = np.array([0, 1])
    loss = build_loss(LossConfig(class_weights=[1.0, 3.0], label_smoothing=0.1), labels, ["a", "b"])
    assert loss.weight.tolist() == [1, 3] and loss.label_smoothing == 0.1
    with pytest.raises(Refused, match=r"each of the 3 classes \(a, b, c\), got 2"):
        build_loss(LossConfig(class_weights=[1.0, 3.0]), labels, ["a", "b", "c"])


def test_a_loss_of_the_users_own_is_built_with_its_args(tmp_path, monkeypatch):
    (tmp_path / "my_loss.py").write_text(
        "from torch import nn\n"
        "class Scaled(nn.CrossEntropyLoss):\n"
        "    def __init__(self, factor):\n"
        "        super().__init__()\n"
        "        self.factor = factor\n"
        "    def forward(self, logits, labels):\n"
        "        return self.factor * super().forward(logits, labels)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    logits, labels = random_outputs()
    loss = build_loss(LossConfig("my_loss:Scaled", args={"factor": 2}), labels.numpy(), ["a"] * 5)
    torch.testing.assert_close(loss(logits, labels), 2 * F.cross_entropy(logits, labels))
    with pytest.raises(Refused, match=r"loss.args: my_loss:Scaled: .*'factr'"):
        build_loss(LossConfig("my_loss:Scaled", args={"factr": 2}), labels.numpy(), ["a"] * 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_loss_is_computed_in_float32_at_least(dtype):
    logits, labels = random_outputs()
    loss = compute_loss(torch.nn.CrossEntropyLoss(), logits.to(dtype), labels)
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, F.cross_entropy(logits.to(dtype).float(), labels))
