"""What a checkpoint holds: one description of the whole file, to its leaves, and the check against it.

A file may come from anybody, and a state that could not be read again must not be written: so both
what is read and what is to be saved is held against the same description.
"""

import contextlib
import hashlib
import math
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch

from cnn.errors import InvalidValue

CONTAINERS = (dict, list, tuple)
MAX_DEPTH = 50
MAX_INT = 2**63

# Of the tensors in a file; `checked_zip` reads no others.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = (*FLOATS, *INTEGERS, torch.complex64, torch.complex128)


class Leaf(NamedTuple):
    """A value: how it is called in a message, and whether one is of this kind."""

    expected: str
    holds: Callable[[Any], bool]


def is_number(value: Any, least: float = -math.inf) -> bool:
    """Whether it is a number of at least `least`; no number is not."""
    return type(value) in (int, float) and value >= least


def is_real(value: Any, ndim: int) -> bool:
    """Whether it is a tensor of real numbers, with so many dimensions."""
    return isinstance(value, torch.Tensor) and value.ndim == ndim and not value.is_complex()


def is_plain(value: Any) -> bool:
    """Whether it is made of what YAML has: no tensor in it, and text for keys."""
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return not isinstance(value, torch.Tensor)


ANY = Leaf("plain values or tensors", lambda value: True)
PLAIN = Leaf("plain values", is_plain)
NULL = Leaf("null", lambda value: value is None)
TEXT = Leaf("text", lambda value: type(value) is str)
WHOLE = Leaf("a whole number of at least 0", lambda v: type(v) is int and 0 <= v < MAX_INT)
NUMBER = Leaf("a number", is_number)
AMOUNT = Leaf("a finite number of at least 0", lambda v: is_number(v, 0) and v < math.inf)
METRIC = Leaf("a number or null", lambda value: type(value) in (int, float, NoneType))
TENSOR = Leaf("a tensor", lambda value: isinstance(value, torch.Tensor))
SCALAR = Leaf("a tensor () of real numbers", lambda value: is_real(value, 0))
VECTOR = Leaf("a tensor (N) of real numbers", lambda value: is_real(value, 1))

# A mapping: names, those that may be missing with a `?`; then patterns for all others. A list of one:
# so many of them. A tuple: one of these.
WEIGHTS = {"*_extra_state": ANY, "*": TENSOR}
PREDICTIONS = {"prediction": VECTOR, "probability": VECTOR}
SUMS = {"loss": SCALAR, "correct": SCALAR, "weight?": (AMOUNT, SCALAR), "count": WHOLE}
SCALES = dict.fromkeys(("scale", "growth_factor", "backoff_factor"), AMOUNT)
SCALING = SCALES | dict.fromkeys(("growth_interval", "_growth_tracker"), WHOLE)
COUNTERS = dict.fromkeys(("num_bad_epochs", "cooldown_counter", "last_epoch"), WHOLE)
PLATEAU = {"best": NUMBER, **COUNTERS}
RATES = dict.fromkeys(("lr", "images_per_second", "seconds"), AMOUNT)
EPOCH = {"epoch": WHOLE, "step": WHOLE, "train_loss": NUMBER, "val_loss": NUMBER, **RATES}
CHECKPOINT = {
    **dict.fromkeys(("format", "draws?", "epoch", "step"), WHOLE),
    "started": TEXT,
    "config": {"*": PLAIN},
    "classes": [TEXT],
    "preprocessing": {"image_size": WHOLE, "channels": WHOLE, "mean": [AMOUNT], "std": [AMOUNT]},
    "class_weights?": (NULL, [AMOUNT]),
    "data": dict.fromkeys(("train", "val", "test", "checksum"), WHOLE),
    "environment": {"precision": TEXT, "*": PLAIN},
    "model_state_dict": WEIGHTS,
    "ema_state_dict": (NULL, WEIGHTS),
    "loss_state_dict?": WEIGHTS,
    "optimizer_state_dict": {
        "state": {int: ANY, "*": ANY},
        "param_groups": [{"params": [WHOLE], "lr": AMOUNT, "initial_lr": AMOUNT, "*": ANY}],
    },
    "scheduler_state_dict": {"by_step": {"last_epoch": WHOLE}, "plateau?": PLATEAU},
    "scaler_state_dict": ({}, SCALING),
    "lr": AMOUNT,
    "group_lrs?": {"*": AMOUNT},
    "unfinished_epoch": {"batch": WHOLE, "sums": SUMS, "seconds": AMOUNT},
    "early_stop": {"waited": WHOLE},
    "best": (NULL, {"metric": TEXT, "value": NUMBER, "epoch": WHOLE}),
    "history": [EPOCH | {"*": METRIC}],
    "test": (NULL, {"*": METRIC}),
    "predictions?": {"val?": PREDICTIONS, "test?": PREDICTIONS},
    "*": PLAIN,  # of a later version
}


def _needed(kinds: dict[Any, Any]) -> list[str]:
    """The names that a mapping must have."""
    return [name for name in kinds if type(name) is str and not set(name) & set("?*")]


KEYS = _needed(CHECKPOINT)


def check_content(content: dict[str, Any]) -> None:
    """Holds the content of a checkpoint against the description, and its parts against each other.

    Raises:
        InvalidValue: beginning with the key.
    """
    check(content, CHECKPOINT)
    classes = content["classes"]
    if not classes or len(set(classes)) < len(classes):
        raise InvalidValue(f"classes: expected names, each once, got {classes[:10]}")
    epoch, best, history = content["epoch"], content["best"], content["history"]
    if len(history) != epoch or any(row["epoch"] != n for n, row in enumerate(history, start=1)):
        raise InvalidValue(f"history: expected the epochs 1 to {epoch}, got {len(history)} others")
    if best is not None and (
        not 0 < best["epoch"] <= epoch
        or history[best["epoch"] - 1].get(best["metric"]) != best["value"]
    ):
        raise InvalidValue(f"best: expected an epoch of the history, got {best}")
    schedule = content["scheduler_state_dict"]
    if "plateau" not in schedule and schedule["by_step"]["last_epoch"] != content["step"]:
        raise InvalidValue(f"scheduler_state_dict.by_step.last_epoch: expected {content['step']}")
    waited = epoch - (best["epoch"] if best else 0)
    if content["early_stop"]["waited"] != waited:
        raise InvalidValue(
            f"early_stop.waited: expected {waited}, got {content['early_stop']['waited']}"
        )
    for split, said in content.get("predictions", {}).items():
        predicted, number = said["prediction"], len(said["probability"])
        if len(predicted) != number or not set(predicted.tolist()) <= {*range(len(classes))}:
            raise InvalidValue(f"predictions.{split}: expected a class of these for each image")


def check(value: Any, kind: Any, key: str = "") -> None:
    """Holds a value against a description; raises InvalidValue, beginning with the key."""
    if isinstance(kind, Leaf):
        if not kind.holds(value):
            raise InvalidValue(f"{key}: expected {kind.expected}, got {describe_value(value)}")
    elif isinstance(kind, tuple):
        *others, last = kind
        for one in others:
            with contextlib.suppress(InvalidValue):
                return check(value, one, key)
        check(value, last, key)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise InvalidValue(f"{key}: expected a list, got {describe_value(value)}")
        for number, item in enumerate(value):
            check(item, kind[0], f"{key}[{number}]")
    else:
        _check_mapping(value, kind, key)


def _check_mapping(value: Any, kinds: dict[Any, Any], key: str) -> None:
    if not isinstance(value, dict):
        raise InvalidValue(f"{key}: expected a mapping, got {describe_value(value)}")
    missing = [name for name in _needed(kinds) if name not in value]
    if missing:
        raise InvalidValue(f"{_below(key, missing[0])}: missing")
    for name, item in value.items():
        kind = _kind_of(name, kinds)
        if kind is None:
            raise InvalidValue(f"{_below(key, name)}: no such key")
        check(item, kind, _below(key, name))


def _kind_of(name: Any, kinds: dict[Any, Any]) -> Any:
    """What is expected under a name; None where no such name is."""
    if type(name) is not str:
        return kinds.get(type(name))
    pattern = "*_extra_state" if name.endswith("_extra_state") and "*_extra_state" in kinds else "*"
    return kinds.get(name, kinds.get(f"{name}?", kinds.get(pattern)))


def _below(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def check_values(content: Any) -> int:
    """Refuses what is no tree of plain values and plain tensors.

    Returns:
        The bytes that the tensors have, in memory that several may share.

    Raises:
        InvalidValue: beginning with the key.
    """
    seen: set[int] = set()
    storages: dict[int, int] = {}

    def walk(tree: Any, key: str, depth: int) -> None:
        if isinstance(tree, torch.Tensor):
            fault = _fault_of(tree)
            if fault is not None:
                raise InvalidValue(f"{key}: expected a plain tensor, got {fault}")
            storages[tree.untyped_storage().data_ptr()] = tree.untyped_storage().nbytes()
        elif isinstance(tree, CONTAINERS):
            # A tree: what hangs at two places or in itself could be endless to walk.
            if (id(tree) in seen and len(tree)) or depth > MAX_DEPTH:
                raise InvalidValue(f"{key}: not a tree of plain values")
            seen.add(id(tree))
            items = tree.items() if isinstance(tree, dict) else enumerate(tree)
            for name, value in items:
                if type(name) not in (str, int):
                    raise InvalidValue(f"{key}: expected plain keys, got {describe_value(name)}")
                walk(value, _below(key, name), depth + 1)
        elif type(tree) not in (NoneType, bool, int, float, str):
            raise InvalidValue(f"{key}: expected a plain value, got {describe_value(tree)}")
        elif type(tree) is int and not -MAX_INT <= tree < 2 * MAX_INT:
            raise InvalidValue(f"{key}: expected a number of 64 bits, got a larger one")

    walk(content, "", 0)
    return sum(storages.values())


def _fault_of(tensor: torch.Tensor) -> str | None:
    """What keeps a tensor from being a plain one, each of whose numbers has a place of its own."""
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "a sparse or quantised one"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugated or negated view"
    if tensor.dtype not in DTYPES:
        return f"one of {str(tensor.dtype).removeprefix('torch.')}, which is not kept"
    reached = 0  # from the first number, by the dimensions of smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape)):
        if size > 1 and stride <= reached:
            return "one whose numbers overlap in memory"
        reached += stride * max(size - 1, 0)
    return None


def outline_of(content: dict[str, Any]) -> str:
    """A hash over a content: all but the many numbers in tensors, which a file's checksums cover."""

    def outline(tree: Any) -> Any:
        if isinstance(tree, torch.Tensor):
            return tree.dtype, tuple(tree.shape), tree.item() if tree.ndim == 0 else None
        if isinstance(tree, dict):
            return sorted((repr(key), outline(value)) for key, value in tree.items())
        if isinstance(tree, (list, tuple)):
            return [outline(value) for value in tree]
        return repr(tree)

    return hashlib.sha256(repr(outline(content)).encode()).hexdigest()


def describe_value(value: Any) -> str:
    """A value as a message tells it: what it is, and a number itself."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {str(value.dtype).removeprefix('torch.')} {tuple(value.shape)}"
    if type(value) in (int, float):
        return str(value)[:40]
    return "null" if value is None else type(value).__name__
