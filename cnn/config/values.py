"""Reads the value of one setting from a YAML node and checks its type and limits."""

import contextlib
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

Metadata = Mapping[str, Any]  # of a dataclass field that the function `setting` made

# For each limit of a number: the comparison, the words for a message, the keyword of JSON Schema.
LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str, str]] = {
    "least": (operator.ge, "of at least", "minimum"),
    "above": (operator.gt, "above", "exclusiveMinimum"),
    "most": (operator.le, "at most", "maximum"),
    "below": (operator.lt, "below", "exclusiveMaximum"),
}
TOO_LARGE = {int: 2**63, float: math.inf}
QUOTES = ("'", '"')
EXPECTED = {types.NoneType: "null", bool: "true or false", dict: "a mapping {key: value}"}


def read_value(node: yaml.Node, kind: Any, meta: Metadata, place: str = "") -> Any:
    """Reads the value of a setting from a YAML node, and checks the value.

    Args:
        node: the node.
        kind: the type of the setting: bool, int, float, str, list[...], dict[str, Any], a dataclass
            such as GroupConfig, or a union of these types and None.
        meta: the metadata of the setting, with its choices and limits.
        place: the place of the node within the setting, such as "[1].scale".

    Raises:
        InvalidValue: the value has another type, is not one of the choices, or is beyond a limit.
            The message begins with the place.
    """
    kinds = alternatives(kind)
    if is_null(node) and types.NoneType in kinds:
        return None
    for each in kinds:
        with contextlib.suppress(ValueError):
            return _read_as(node, each, meta, place)
    near = suggest(node.value.lower(), meta["choices"]) if isinstance(node, yaml.ScalarNode) else ""
    if isinstance(node, yaml.MappingNode) and str in kinds:
        near = "; text in braces needs quotes around it"
    elif isinstance(node, yaml.ScalarNode) and node.value in meta["choices"]:
        near = f"; write [{node.value}]"  # a list is expected
    got = f"{describe_node(node)}{near}"
    raise InvalidValue(f"{place}: expected {_expected(kind, meta)}, got {got}")


def read_list(node: yaml.SequenceNode, kind: Any, meta: Metadata, place: str = "") -> list[Any]:
    """Reads every item of a YAML list as a value of the same type.

    Args:
        node: the list.
        kind: the type of the items, such as float or GroupConfig.
        meta: the metadata of the setting, with the choices and limits of the items.
        place: the place of the list within the setting, as for `read_value`.

    Raises:
        InvalidValue: an item is wrong. The message begins with the place of the item, such as
            "[1]".
    """
    items = enumerate(node.value)
    return [read_value(item, kind, meta, f"{place}[{number}]") for number, item in items]


def _read_mapping(node: yaml.Node, cls: type, place: str) -> Any:
    """Reads an item of a YAML list as a dataclass.

    The item is a mapping, such as `{name: flip}`. If only the first field of the dataclass lacks a
    default, the item may be the value of the first field, such as `flip`.

    Args:
        node: the item.
        cls: the dataclass, such as AugmentationConfig.
        place: the place of the item within the setting, as for `read_value`.

    Raises:
        InvalidValue: the item has another form, a key is unknown, repeated or missing, or a value
            is wrong.
    """
    fields = {field.name: field for field in dataclasses.fields(cls)}
    required = required_keys(cls)
    first = next(iter(fields.values()))
    if isinstance(node, yaml.ScalarNode) and required == [first.name]:
        return cls(read_value(node, first.type, first.metadata, place))
    if not isinstance(node, yaml.MappingNode):
        raise InvalidValue(f"{place}: expected {_expected(cls, {})}, got {describe_node(node)}")
    values = {}
    for key, item in _items(node, place).items():
        if key not in fields:
            near = suggest(key, fields) or f"; there are {', '.join(fields)}"
            raise InvalidValue(f"{place}.{key}: no such key{near}")
        values[key] = read_value(item, fields[key].type, fields[key].metadata, f"{place}.{key}")
    for key in required:
        if key not in values:
            raise InvalidValue(f"{place}.{key}: missing; expected {_expected(cls, {})}")
    return cls(**values)


def _items(node: yaml.MappingNode, place: str) -> dict[str, yaml.Node]:
    """Returns the values of a YAML mapping by key.

    Args:
        node: the mapping.
        place: the place of the mapping within the setting, as for `read_value`.

    Raises:
        InvalidValue: a key is given twice.
    """
    items: dict[str, yaml.Node] = {}
    for key, item in node.value:
        if key.value in items:
            raise InvalidValue(f"{place}.{key.value}: given twice")
        items[key.value] = item
    return items


def plain_value(node: yaml.Node, place: str = "") -> Any:
    """Reads a plain value of any type from a YAML node.

    A plain value is None, a bool, int, float or text, or a list or dict of plain values.

    Args:
        node: the node.
        place: the place of the value within the setting, as for `read_value`.

    Raises:
        InvalidValue: a key is given twice, or a text contains control characters.
    """
    if isinstance(node, yaml.SequenceNode):
        return [plain_value(item, place) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        return {key: plain_value(item, place) for key, item in _items(node, place).items()}
    if is_null(node):
        return None
    for kind in (bool, int, float, str):
        with contextlib.suppress(ValueError):
            return _read_scalar(node, kind)
    raise InvalidValue(f"{place}: expected plain values, got {describe_node(node)}")


def _read_as(node: yaml.Node, kind: Any, meta: Metadata, place: str) -> Any:
    """Reads the value of a setting as a value of one type.

    If the type is a list or dict, null is read as an empty list or dict.

    Args:
        node: the YAML node of the value.
        kind: the type, such as int, list[str] or GroupConfig, but not a union.
        meta: the metadata of the setting, with its choices and limits.
        place: the place of the node within the setting, as for `read_value`.

    Raises:
        ValueError: the value has another type, is not one of the choices, or is beyond a limit.
        InvalidValue: the value is a list or a mapping with a wrong item.
    """
    if dataclasses.is_dataclass(kind):
        return _read_mapping(node, kind, place)
    origin = typing.get_origin(kind)
    if origin is not None and is_null(node):
        return origin()  # an empty list or dict
    if origin is list and isinstance(node, yaml.SequenceNode):
        return read_list(node, typing.get_args(kind)[0], meta, place)
    if origin is dict and isinstance(node, yaml.MappingNode):
        return plain_value(node, place)
    value = _read_scalar(node, kind)
    if not _is_allowed(value, meta):
        raise ValueError
    return value


def _read_scalar(node: yaml.Node, kind: Any) -> bool | int | float | str:
    """Reads a bool, int, float or str from a YAML node.

    Args:
        node: the node.
        kind: the type to read: bool, int, float or str.

    Raises:
        ValueError: the node is not a value of the type `kind`, a number is NaN or too large, or a
            text contains control characters. Any other `kind` raises ValueError too.
    """
    if not isinstance(node, yaml.ScalarNode) or kind not in (bool, int, float, str):
        raise ValueError
    text = node.value
    if kind is str:
        # No name contains control characters or unpaired surrogates.
        if is_null(node) or any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
            raise ValueError
        return text
    if node.style in QUOTES or not text.isascii():
        raise ValueError
    if kind is bool:
        return bool(("false", "true").index(text.lower()))
    value = kind(text)
    if not abs(value) < TOO_LARGE[kind]:  # the comparison is false for NaN too
        raise ValueError
    return value


def is_null(node: yaml.Node) -> bool:
    """Returns whether a YAML node means null.

    A node means null if the node is unquoted and its text is empty, `null` or `~`.

    Args:
        node: the node.
    """
    is_unquoted = isinstance(node, yaml.ScalarNode) and node.style not in QUOTES
    return is_unquoted and node.value.lower() in ("", "null", "~")


def _is_allowed(value: Any, meta: Metadata) -> bool:
    if isinstance(value, str):
        if meta["choices"] and value not in meta["choices"]:
            return meta["names_code"] and is_import_path(value)
        return meta["pattern"] is None or re.fullmatch(meta["pattern"], value) is not None
    return isinstance(value, bool) or all(
        meta[limit] is None or holds(value, meta[limit]) for limit, (holds, _, _) in LIMITS.items()
    )


# -- words for messages --------------------------------------------------------------------------


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the types in a union, such as (int, NoneType) for `int | None`.

    Args:
        kind: the union. For any other type, the result is a tuple of `kind` alone.
    """
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _expected(kind: Any, meta: Metadata) -> str:
    return " or ".join(_expected_as(each, meta) for each in alternatives(kind))


def _expected_as(kind: Any, meta: Metadata) -> str:
    """Describes the values that a setting may have, such as "a number above 0".

    Args:
        kind: the type of the setting, but not a union.
        meta: the metadata of the setting, with its choices and limits.
    """
    origin = typing.get_origin(kind) or kind
    if origin in EXPECTED:
        return EXPECTED[origin]
    if origin is list:
        return f"a list [a, b] of {_expected(typing.get_args(kind)[0], meta)}"
    if dataclasses.is_dataclass(kind):
        fields = dataclasses.fields(kind)
        mapping = "{" + ", ".join(field.name for field in fields) + "}"
        is_short = required_keys(kind) == [fields[0].name]
        return f"{_expected(str, fields[0].metadata)}, or {mapping}" if is_short else mapping
    if kind is str:
        words = choices_of(meta)
        if not words:
            return "text" if meta["pattern"] is None else meta["description"]
        return ("one of " if len(words) > 1 else "") + ", ".join(words)
    words_of = {key: words for key, (_, words, _) in LIMITS.items() if meta[key] is not None}
    limits = [f"{words} {meta[key]}" for key, words in words_of.items()]
    return " ".join(["a whole number" if kind is int else "a number", " and ".join(limits)]).strip()


def describe_node(node: yaml.Node) -> str:
    """Describes the value of a YAML node for a message.

    Args:
        node: the node.

    Returns:
        "a list", "a mapping", "null", "nothing" for an empty value, or the text of any other value.
        A text of more than 60 characters is shortened.
    """
    if not isinstance(node, yaml.ScalarNode):
        return "a list" if isinstance(node, yaml.SequenceNode) else "a mapping"
    if is_null(node):
        return "null" if node.value else "nothing"
    text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    return repr(text) if node.style in QUOTES or not text.isprintable() else text


def choices_of(meta: Metadata) -> list[str]:
    """Returns the words that a setting accepts, such as ["sgd", "adam"].

    If the setting may name code of the user, the last word is "package.module:name".

    Args:
        meta: the metadata of the setting.

    Returns:
        The words; [] for a setting without a list of choices.
    """
    words = list(meta["choices"])
    return [*words, "package.module:name"] if words and meta["names_code"] else words


def suggest(word: str, known: Iterable[str]) -> str:
    """Returns a question that suggests a known word for an unknown word.

    The question suggests the most similar known word, in upper or lower case.

    Args:
        word: the unknown word.
        known: the known words.

    Returns:
        The question, such as " — did you mean 'adam'?"; "" if there is nothing to suggest.
    """
    folded = {fold(name): name for name in known}
    near = difflib.get_close_matches(fold(word), folded, n=1)
    return f" — did you mean '{folded[near[0]]}'?" if near else ""


def fold(name: str) -> str:
    """Returns a name in a form that is the same for upper and lower case and Unicode forms."""
    return unicodedata.normalize("NFC", name).casefold()
