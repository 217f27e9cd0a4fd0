"""The structure of a checkpoint: a table of every key with its kind, and the check against it.

A file may come from anybody, and a state that could not be read again must not be written. So the
content is checked against the same table both when it is read and before it is saved.
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

# Every tensor of a checkpoint has one of these dtypes. `checked_zip` reads no others.
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
DTYPES = (*FLOATS, *INTEGERS, torch.complex64, torch.complex128)


class Leaf(NamedTuple):
    """A kind of value that a checkpoint can contain, such as a text.

    Attributes:
        expected: the name of the kind in error messages, such as "a finite number of at least 0".
        matches: a function that returns whether a value is of the kind.
    """

    expected: str
    matches: Callable[[Any], bool]


def is_real(value: Any, ndim: int) -> bool:
    """Returns whether a value is a tensor of real numbers with `ndim` dimensions.

    Every dtype that is not complex counts as real.
    """
    return isinstance(value, torch.Tensor) and value.ndim == ndim and not value.is_complex()


def is_plain(value: Any) -> bool:
    """Returns whether a value contains no tensors and no dict keys except texts.

    Values nested in dicts, lists and tuples are examined, too.
    """
    if isinstance(value, dict):
        return all(type(key) is str and is_plain(inner) for key, inner in value.items())
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    return not isinstance(value, torch.Tensor)


ANY = Leaf("plain values or tensors", lambda _: True)
PLAIN = Leaf("plain values", is_plain)
NULL = Leaf("null", lambda value: value is None)
FLAG = Leaf("true or false", lambda value: type(value) is bool)
TEXT = Leaf("text", lambda value: type(value) is str)
WHOLE = Leaf("a whole number of at least 0", lambda v: type(v) is int and 0 <= v < MAX_INT)
NUMBER = Leaf("a number", lambda v: type(v) in (int, float) and v >= -math.inf)  # but not NaN
AMOUNT = Leaf("a finite number of at least 0", lambda v: NUMBER.matches(v) and 0 <= v < math.inf)
FACTOR = Leaf("a finite number above 0", lambda v: AMOUNT.matches(v) and v > 0)
METRIC = Leaf("a number or null", lambda value: type(value) in (int, float, NoneType))
TENSOR = Leaf("a tensor", lambda value: isinstance(value, torch.Tensor))
SCALAR = Leaf("a tensor () of real numbers", lambda value: is_real(value, 0))
VECTOR = Leaf("a tensor (N) of real numbers", lambda value: is_real(value, 1))

# In the tables below, a dict is a mapping: `name?` may be missing, and "*" stands for all other
# names. A list of one kind is a list of any length. A tuple contains alternatives.
WEIGHTS = {"*_extra_state": ANY, "*": TENSOR}
PREDICTIONS = {"prediction": VECTOR, "probability": VECTOR, "probabilities?": TENSOR}
SUMS = {"loss": SCALAR, "correct": SCALAR, "weight?": (AMOUNT, SCALAR), "count": WHOLE}
SCALING = dict.fromkeys(("scale", "growth_factor", "backoff_factor"), AMOUNT)
SCALING |= dict.fromkeys(("growth_interval", "_growth_tracker"), WHOLE)
PLATEAU = {"best": NUMBER, "num_bad_epochs": WHOLE, "cooldown_counter": WHOLE, "last_epoch": WHOLE}
RATES = dict.fromkeys(("lr", "images_per_second", "seconds"), AMOUNT)
EPOCH = {"epoch": WHOLE, "step": WHOLE, "train_loss": NUMBER, "val_loss": NUMBER, **RATES}
CHECKPOINT = {
    **dict.fromkeys(("format", "draws?", "epoch", "step"), WHOLE),
    "started": TEXT,
    "config": {"*": PLAIN},
    "classes": [TEXT],
    "new_parameters?": [TEXT],
    "preprocessing": {
        **dict.fromkeys(("image_size", "channels"), WHOLE),
        "mean": [AMOUNT],
        "std": [AMOUNT],
        "value_range?": (NULL, TEXT, [NUMBER]),
        "fit?": TEXT,
        "scaled?": FLAG,
    },
    "class_weights?": (NULL, [AMOUNT]),
    "data": dict.fromkeys(("train", "val", "test", "checksum", "content?", "groups?"), WHOLE),
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
    **dict.fromkeys(("temperature?", "threshold?"), (NULL, FACTOR)),
    "predictions?": {"val?": PREDICTIONS, "test?": PREDICTIONS},
    "*": PLAIN,  # entries of a later version
}
# The entries of a checkpoint that is read without its tensors.
METADATA = {key: kind for key, kind in CHECKPOINT.items() if not key.rstrip("?").endswith("_dict")}
METADATA |= {"unfinished_epoch": {"batch": WHOLE, "*": ANY}, "predictions?": ANY}


def _required(kinds: dict[Any, Any]) -> list[str]:
    return [name for name in kinds if type(name) is str and not set(name) & set("?*")]


KEYS = _required(CHECKPOINT)


def check_content(content: dict[str, Any]) -> None:
    """Checks that the entries of a checkpoint are complete and fit each other.

    Args:
        content: the entries of the checkpoint by name.

    Raises:
        InvalidValue: an entry is missing, has a wrong kind of value, or contradicts another entry.
            The message begins with the key of the entry, such as "best.epoch".
    """
    check_values(content)
    check(content, CHECKPOINT)
    classes = content["classes"]
    if not classes or len(set(classes)) < len(classes):
        raise InvalidValue(f"classes: expected names, each once, got {classes[:10]}")
    epoch, best, history = content["epoch"], content["best"], content["history"]
    if len(history) != epoch or any(row["epoch"] != n for n, row in enumerate(history, start=1)):
        raise InvalidValue(f"history: expected the epochs 1 to {epoch}, got {len(history)} others")
    if best is not None:
        row = history[best["epoch"] - 1] if 0 < best["epoch"] <= epoch else {}
        if row.get(best["metric"]) != best["value"]:
            raise InvalidValue(f"best: expected an epoch of the history, got {best}")
    schedule = content["scheduler_state_dict"]
    if "plateau" not in schedule and schedule["by_step"]["last_epoch"] != content["step"]:
        raise InvalidValue(f"scheduler_state_dict.by_step.last_epoch: expected {content['step']}")
    since_best, saved = epoch - (best["epoch"] if best else 0), content["early_stop"]["waited"]
    if saved != since_best:
        raise InvalidValue(f"early_stop.waited: expected {since_best}, got {saved}")
    for split, columns in content.get("predictions", {}).items():
        predicted, num_images = columns["prediction"].tolist(), len(columns["probability"])
        if len(predicted) != num_images or not set(predicted) <= set(range(len(classes))):
            raise InvalidValue(f"predictions.{split}: expected a class of these for each image")
        of_all, shape = columns.get("probabilities"), (num_images, len(classes))
        if of_all is not None and (tuple(of_all.shape) != shape or not of_all.is_floating_point()):
            raise InvalidValue(f"predictions.{split}.probabilities: expected numbers of {shape}")


def check(value: Any, kind: Any, key: str = "") -> None:
    """Checks a value, and all nested values, against a table of kinds.

    Args:
        value: the value to check.
        kind: a `Leaf`, or a table such as {"epoch": WHOLE, "classes": [TEXT]}, where WHOLE and TEXT
            are of type `Leaf`. A dict maps names to kinds. A list has the kind of all items. A
            tuple has alternative kinds. In a dict, a name with "?" at the end can be missing. The
            name "*" stands for all other names.
        key: the place of the value in the checkpoint, such as "best.epoch"; "" for the whole
            checkpoint.

    Raises:
        InvalidValue: a value is missing or of the wrong kind. The message begins with the key of
            the value.
    """
    if isinstance(kind, Leaf):
        if not kind.matches(value):
            raise InvalidValue(f"{key}: expected {kind.expected}, got {describe_value(value)}")
    elif isinstance(kind, tuple):
        for alternative in kind[:-1]:
            with contextlib.suppress(InvalidValue):
                check(value, alternative, key)
                return
        check(value, kind[-1], key)
    elif isinstance(kind, list):
        if not isinstance(value, list):
            raise InvalidValue(f"{key}: expected a list, got {describe_value(value)}")
        for number, item in enumerate(value):
            check(item, kind[0], f"{key}[{number}]")
    elif not isinstance(value, dict):
        raise InvalidValue(f"{key}: expected a mapping, got {describe_value(value)}")
    else:
        missing = [name for name in _required(kind) if name not in value]
        if missing:
            raise InvalidValue(f"{_join(key, missing[0])}: missing")
        for name, item in value.items():
            check(item, _kind_of(name, kind, key), _join(key, name))


def _kind_of(name: Any, kinds: dict[Any, Any], key: str) -> Any:
    """Returns the kind of value that a table prescribes for a name.

    Args:
        name: a name in a mapping of the checkpoint, such as "epoch".
        kinds: the table for the mapping. A table entry "*" is for all names that are not in the
            table.
        key: the place of the mapping in the checkpoint, such as "best", for the error message.

    Returns:
        The kind of the value: a `Leaf` or a table.

    Raises:
        InvalidValue: the table does not allow the name.
    """
    names = [type(name)]
    if type(name) is str:
        names = [name, f"{name}?", "*_extra_state" if name.endswith("_extra_state") else "*", "*"]
    for known in names:
        if known in kinds:
            return kinds[known]
    raise InvalidValue(f"{_join(key, name)}: no such key")


def _join(key: str, name: Any) -> str:
    return f"{key}.{name}" if key else str(name)


def check_values(tree: Any) -> None:
    """Checks that nested dicts, lists and tuples contain only plain values and tensors.

    Plain values are None, bool, int, float and str. Tensors must be dense, and no two elements of a
    tensor may share memory. The keys of dicts must be texts or ints.

    Args:
        tree: the dict, list or tuple to check.

    Raises:
        InvalidValue: a value, a tensor or a key is not allowed, a container occurs twice, or the
            nesting is too deep. The message begins with the key of the value, such as
            "optimizer_state_dict.state".
    """
    _check_value(tree, "", 0, set())


def _check_value(tree: Any, key: str, depth: int, seen: set[int]) -> None:
    """Checks that a value and all nested values are plain.

    Plain are None, bool, int, float, str and dense tensors. Dicts, lists and tuples of plain values
    are plain, too.

    Args:
        tree: the value to check.
        key: the place of the value in the checkpoint, such as "optimizer_state_dict.state".
        depth: the number of containers around the value.
        seen: the ids of the containers that earlier calls have checked. The function adds the ids
            of further containers.

    Raises:
        InvalidValue: a value is not plain. The message begins with the key of the value.
    """
    if isinstance(tree, torch.Tensor):
        fault = _fault_of(tree)
        if fault is not None:
            raise InvalidValue(f"{key}: expected a plain tensor, got {fault}")
    elif isinstance(tree, CONTAINERS):
        # A container that occurs twice, or inside itself, could take endless time to check.
        if (id(tree) in seen and len(tree)) or depth > MAX_DEPTH:
            raise InvalidValue(f"{key}: not a tree of plain values")
        seen.add(id(tree))
        for name, value in dict.items(tree) if isinstance(tree, dict) else enumerate(tree):
            if type(name) not in (str, int):
                raise InvalidValue(f"{key}: expected plain keys, got {describe_value(name)}")
            _check_value(value, _join(key, name), depth + 1, seen)
    elif type(tree) not in (NoneType, bool, int, float, str):
        raise InvalidValue(f"{key}: expected a plain value, got {describe_value(tree)}")
    elif type(tree) is int and not -MAX_INT <= tree < 2 * MAX_INT:
        raise InvalidValue(f"{key}: expected a number of 64 bits, got a larger one")


def _fault_of(tensor: torch.Tensor) -> str | None:
    """Returns why a checkpoint cannot contain a tensor; None if there is no reason.

    The tensor must be dense, and have a common dtype such as float32. The tensor must not be a
    conjugated or negated view. No two elements of the tensor may share memory.

    Returns:
        The end of an error message, such as "a conjugated or negated view", or None.
    """
    if tensor.layout != torch.strided or tensor.is_quantized:
        return "a sparse or quantised one"
    if tensor.is_conj() or tensor.is_neg():
        return "a conjugated or negated view"
    if tensor.dtype not in DTYPES:
        return f"one of {_name_of(tensor.dtype)}, which is not kept"
    reached = 0  # offset of the last element within the dimensions of smaller strides
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reached:
            return "one whose numbers overlap in memory"
        reached += stride * max(size - 1, 0)
    return None


def structure_hash(content: dict[str, Any]) -> str:
    """Computes a SHA-256 of a checkpoint's plain values, tensor shapes and dtypes.

    The elements of tensors are left out. Only the value of a tensor without dimensions is included.

    Args:
        content: the entries of the checkpoint by name.

    Returns:
        The hash in hexadecimal digits.
    """
    return hashlib.sha256(repr(_structure(content)).encode()).hexdigest()


def _structure(tree: Any) -> Any:
    if isinstance(tree, torch.Tensor):
        return tree.dtype, tuple(tree.shape), tree.item() if tree.ndim == 0 else None
    if isinstance(tree, dict):
        return sorted((repr(key), _structure(value)) for key, value in tree.items())
    if isinstance(tree, (list, tuple)):
        return [_structure(value) for value in tree]
    return repr(tree)


def describe_value(value: Any) -> str:
    """Describes a value for an error message.

    Returns:
        A number as text, "null" for None, or a text such as "a tensor float32 (2, 3)" for a tensor.
        Any other value is described by the name of the type, such as "list".
    """
    if isinstance(value, torch.Tensor):
        return f"a tensor {_name_of(value.dtype)} {tuple(value.shape)}"
    if type(value) in (int, float):
        return str(value)[:40]
    return "null" if value is None else type(value).__name__


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
