"""One value of a setting: read from YAML, held against its type and limits."""

import dataclasses
import difflib
import math
import operator
import re
import types
import typing
import unicodedata
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import yaml

from cnn.config.settings import is_import_path, required_keys
from cnn.errors import InvalidValue

LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "least": (operator.ge, "of at least"),
    "above": (operator.gt, "above"),
    "most": (operator.le, "at most"),
    "below": (operator.lt, "below"),
}


def read_value(node: yaml.Node, kind: Any, meta: Mapping[str, Any]) -> Any:
    """Reads a value of that type within its limits; InvalidValue where it is none."""
    alternatives = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in alternatives and is_null(node):
        return None
    if isinstance(node, yaml.SequenceNode):
        for alternative in alternatives:
            if typing.get_origin(alternative) is list:
                return read_list(node, typing.get_args(alternative)[0], meta)
    elif isinstance(node, yaml.MappingNode):
        if typing.get_origin(kind) is dict:
            return plain_value(node)
    elif (typing.get_origin(kind) in (list, dict)) and is_null(node):
        return typing.get_origin(kind)()
    else:
        for alternative in alternatives:
            try:
                value = _read_scalar(node, alternative)
            except ValueError:
                continue
            if _allowed(value, meta):
                return value
    near = suggest(node.value.lower(), meta["choices"]) if isinstance(node, yaml.ScalarNode) else ""
    raise InvalidValue(f": expected {_expected(kind, meta)}, got {describe_node(node)}{near}")


def read_list(node: yaml.SequenceNode, kind: Any, meta: Mapping[str, Any]) -> list[Any]:
    """Reads every item as that kind of value; a mistake begins with the item's number."""
    values = []
    for number, item in enumerate(node.value):
        try:
            if dataclasses.is_dataclass(kind):
                values.append(_read_mapping(item, kind))
            else:
                values.append(read_value(item, kind, meta))
        except InvalidValue as mistake:
            raise InvalidValue(f"[{number}]{mistake}") from None
    return values


def _read_mapping(node: yaml.Node, cls: type) -> Any:
    """A mapping as the dataclass; its first key's value alone, where it needs no other."""
    fields, hints = {f.name: f for f in dataclasses.fields(cls)}, typing.get_type_hints(cls)
    first, *_ = fields
    if isinstance(node, yaml.ScalarNode) and required_keys(cls) == [first]:
        return cls(read_value(node, hints[first], fields[first].metadata))
    if not isinstance(node, yaml.MappingNode):
        raise InvalidValue(f": expected {_expected(cls, {})}, got {describe_node(node)}")
    values = {}
    for key_node, item in node.value:
        key = str(key_node.value)
        if key not in fields:
            raise InvalidValue(f".{key}: no such key{suggest(key, fields)}")
        if key in values:
            raise InvalidValue(f".{key}: given twice")
        try:
            values[key] = read_value(item, hints[key], fields[key].metadata)
        except InvalidValue as mistake:
            raise InvalidValue(f".{key}{mistake}") from None
    missing = [name for name in required_keys(cls) if name not in values]
    if missing:
        raise InvalidValue(f".{missing[0]}: missing; expected {_expected(cls, {})}")
    return cls(**values)


def _read_scalar(node: yaml.Node, kind: Any) -> Any:
    """The value of a scalar as a bool, int, float or str; ValueError where it is none."""
    text = str(node.value)
    if kind is str:
        if is_null(node) or any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
            raise ValueError  # control characters and half characters are in no name
        return text
    word = text.lower()
    if getattr(node, "style", None) in ("'", '"') or not text.isascii():
        raise ValueError
    if kind is bool and word in ("true", "false"):
        return word == "true"
    if kind is int and abs(int(text)) < 2**63:
        return int(text)
    if kind is float and math.isfinite(float(text)):
        return float(text)
    raise ValueError


def is_null(node: yaml.Node) -> bool:
    """Whether nothing, null or ~ is written there, without quotes."""
    return (
        isinstance(node, yaml.ScalarNode)
        and node.style not in ("'", '"')
        and node.value.lower() in ("", "null", "~")
    )


def plain_value(node: yaml.Node) -> Any:
    """A free value (for args): null, bool, int, float, text, lists and mappings of these."""
    if isinstance(node, yaml.SequenceNode):
        return [plain_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise InvalidValue(f".{twice}: given twice")
        return {key: plain_value(item) for key, (_, item) in zip(keys, node.value)}
    if is_null(node):
        return None
    for kind in (bool, int, float):
        try:
            return _read_scalar(node, kind)
        except ValueError:
            pass
    try:
        return _read_scalar(node, str)
    except ValueError:
        raise InvalidValue(f": expected plain values, got {describe_node(node)}") from None


def _allowed(value: Any, meta: Mapping[str, Any]) -> bool:
    if isinstance(value, str):
        known, pattern = meta["choices"], meta["pattern"]
        if known and value not in known:
            return meta["names_code"] and is_import_path(value)
        return pattern is None or re.fullmatch(pattern, value) is not None
    return isinstance(value, bool) or all(
        meta[limit] is None or holds(value, meta[limit]) for limit, (holds, _) in LIMITS.items()
    )


def _expected(kind: Any, meta: Mapping[str, Any]) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_expected(part, meta) for part in typing.get_args(kind))
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return f"a list [a, b] of {_expected(inner, meta)}"
    if typing.get_origin(kind) is dict:
        return "a mapping {key: value}"
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        mapping = "{" + ", ".join(field.name for field in fields) + "}"
        if required_keys(kind) == [fields[0].name]:  # its value alone will do
            return f"{_expected(str, fields[0].metadata)}, or {mapping}"
        return mapping
    if kind is bool:
        return "true or false"
    if kind is str:
        words = choices_of(meta)
        if not words:
            return "text" if meta["pattern"] is None else meta["description"]
        return ("one of " if len(words) > 1 else "") + ", ".join(words)
    name = "a whole number" if kind is int else "a number"
    limits = [
        f"{word} {meta[limit]}" for limit, (_, word) in LIMITS.items() if meta[limit] is not None
    ]
    return " ".join([name, " and ".join(limits)]).strip()


def describe_node(node: yaml.Node) -> str:
    """Tells what came instead of a value, on one line and not too long."""
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if is_null(node):
        return "nothing" if node.value == "" else "null"
    text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    return (
        ascii(text) if not text.isprintable() else repr(text) if node.style in ("'", '"') else text
    )


def choices_of(meta: Mapping[str, Any]) -> list[str]:
    """The words that a setting takes, where they are certain ones; code last."""
    words = list(meta["choices"])
    return [*words, "package.module:name"] if words and meta["names_code"] else words


def suggest(word: str, known: Iterable[str]) -> str:
    """— did you mean 'x'? for the nearest known word, or nothing."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:  # the right key in the wrong section
        near = [name for name in known if name.split(".")[-1] == word.split(".")[-1]][:1]
    return f" — did you mean '{near[0]}'?" if near else ""
