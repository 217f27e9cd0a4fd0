"""Settings from files and the command line: which keys, where each was given, every mistake at once."""

import dataclasses
import os
import re
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cnn.config.checks import check_together
from cnn.config.settings import SECTIONS, Config, keys_of
from cnn.config.values import describe_node, is_null, read_value, suggest
from cnn.config.writer import dump
from cnn.errors import InvalidValue, Refused

MAX_CONFIG_BYTES = 100_000  # the files shipped have about 2,000
MAX_DEPTH = 20  # of brackets and indents; PyYAML takes minutes for some thousands

# What configs/best_hparams/*.yaml hold beside the settings; read past, so that --config takes them.
RECORDS = ("best_metrics", "test_metrics", "updated_at", "history")


@dataclass(frozen=True)
class Given:
    """A value as it was written, and where."""

    node: yaml.Node
    where: str


# ---------------------------------------------------------------------------------------------
# From files and command line to a Config


def load_config(
    path: Path | None, overrides: Sequence[str] = (), base: Mapping[str, Any] | None = None
) -> tuple[Config, dict[str, str]]:
    """Reads the settings and where each was given.

    Args:
        path: the YAML file; it may name another one as its `base:`. None for no file.
        overrides: `section.key=value`, each laid over the file.
        base: values of an earlier run (`to_dict`), below file and overrides.

    Returns:
        The configuration, and for each dotted key that was given, where: `FILE:LINE`.

    Raises:
        Refused: with every mistake, a line each.
    """
    mistakes: list[str] = []
    given: dict[str, Given] = {}
    if base is not None:
        given |= flatten(compose(dump(dict(base)), "checkpoint"), "checkpoint", mistakes)
    if path is not None:
        given |= read_file(path, mistakes)
    for override in overrides:
        given |= read_override(override, mistakes)
    cfg = build(Config, given, mistakes)
    if mistakes:
        raise Refused("\n".join(mistakes))
    return cfg, {key: item.where for key, item in given.items()}


def read_file(path: Path, mistakes: list[str], seen: tuple[Path, ...] = ()) -> dict[str, Given]:
    """Reads a file's keys with those of the files that it names as its base."""
    if path.resolve() in seen:
        raise Refused(f"{path}: base: the files name each other in a circle")
    root = compose(read_text(path), str(path))
    given = flatten(root, str(path), mistakes)
    given = {key: item for key, item in given.items() if key not in RECORDS}
    base = given.pop("base", None)
    if base is None:
        return given
    base_path = path.parent / str(base.node.value)
    # os.path's is False for a name that no file can have, where Path's raises
    if not isinstance(base.node, yaml.ScalarNode) or not os.path.isfile(base_path):
        raise Refused(
            f"{base.where}: base: expected a file beside this one, got {describe_node(base.node)}"
        )
    return read_file(base_path, mistakes, (*seen, path.resolve())) | given


def read_text(path: Path) -> str:
    """Reads a file that may be a configuration, UTF-8 and not too large."""
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)  # no more: it may be a device without an end
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        raise Refused(
            f"{path}: cannot read the configuration ({reason}); --config FILE names another"
        ) from None
    if len(data) > MAX_CONFIG_BYTES:
        raise Refused(
            f"{path}: expected a configuration, got a file of more than {MAX_CONFIG_BYTES:,} bytes"
        )
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise Refused(
            f"{path}:{line}: expected UTF-8 text, got the byte {data[error.start]:#04x}"
        ) from None


def read_override(text: str, mistakes: list[str]) -> dict[str, Given]:
    """Reads `section.key=value` as it is typed."""
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        mistakes.append(f"command line: expected section.key=value, got {text!r}")
        return {}
    if key in SECTIONS:
        mistakes.append(f"command line: {key}: is a section; write {key}.KEY=value")
        return {}
    if value[:1] in ("[", "{", "'", '"'):
        node = compose(value, f"command line: {key}")
    else:  # the shell's word as it is: a path may hold ': ' or ' #'
        node = yaml.ScalarNode("tag:yaml.org,2002:str", value.strip())
    return {key: Given(node, "command line")}


class _Composer(yaml.SafeLoader):
    """Makes nodes of YAML; refuses what a configuration has no use for."""

    def __init__(self, text: str, where: str):
        super().__init__(text)
        self.where, self.depth = where, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        at = place_of(self.where, event)
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise Refused(f"{at}: anchors and aliases (& *) are not allowed")
        if event.tag not in (None, "!"):
            raise Refused(f"{at}: tags (!) are not allowed, got {event.tag}")
        if self.depth == MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            raise Refused(f"{at}: nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                at = place_of(self.where, key)
                raise Refused(f"{at}: expected a plain key, got {describe_node(key)}")
        return node


def compose(text: str, where: str) -> yaml.Node | None:
    """Parses YAML into nodes."""
    try:
        return _Composer(text, where).get_single_node()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        begun = error.context_mark.line + 1 if error.context_mark else line
        context = f" ({error.context}, begun in line {begun})" if begun != line else ""
        raise Refused(
            f"{_at_line(where, line)}: not valid YAML: {error.problem}{context}"
        ) from None
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        raise Refused(
            f"{_at_line(where, line)}: not valid YAML: the character {error.character:#x}"
        ) from None


def place_of(where: str, thing: Any) -> str:
    """Names the line in which a YAML node or event begins."""
    return _at_line(where, thing.start_mark.line + 1)


def _at_line(where: str, line: int) -> str:
    return where if where.startswith(("command line", "checkpoint")) else f"{where}:{line}"


def flatten(root: yaml.Node | None, where: str, mistakes: list[str]) -> dict[str, Given]:
    """The file's keys as section.key, with duplicates and misplaced values told."""
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise Refused(
            f"{place_of(where, root)}: expected `section:` and `key: value` lines, got {describe_node(root)}"
        )
    given: dict[str, Given] = {}
    first: dict[str, str] = {}

    def add(key: str, key_node: yaml.Node, node: yaml.Node) -> None:
        if key in first:
            mistakes.append(
                f"{place_of(where, key_node)}: {key}: given twice, first at {first[key]}"
            )
        first[key] = place_of(where, key_node)

    for key_node, node in root.value:
        section = str(key_node.value)
        add(section, key_node, node)
        if section not in SECTIONS:
            given[section] = Given(node, place_of(where, key_node))
        elif isinstance(node, yaml.MappingNode):
            for inner_key, inner in node.value:
                key = f"{section}.{inner_key.value}"
                add(key, inner_key, inner)
                given[key] = Given(inner, place_of(where, inner_key))
        elif not is_null(node):
            mistakes.append(
                f"{place_of(where, key_node)}: {section}: expected a section of keys below"
            )
    return given


def build(cls: type, given: dict[str, Given], mistakes: list[str]) -> Any:
    """Makes the dataclass from what was given; collects every mistake."""
    known = {key: (field, kind) for key, field, kind in keys_of(cls)}
    values, found = {}, []
    for key, item in given.items():
        if key not in known:
            found.append(f"{item.where}: {key}: no such key{suggest(key, known)}")
            continue
        field, kind = known[key]
        try:
            values[key] = read_value(item.node, kind, field.metadata)
        except InvalidValue as mistake:
            found.append(f"{item.where}: {key}{mistake}")
    made = _assemble(cls, "", values)
    if cls is Config and not found:
        places = {key: f"{item.where}: {key}" for key, item in given.items()}
        found = check_together(made, lambda key: places.get(key, key))
    mistakes += found
    return made


def _assemble(cls: type, prefix: str, values: dict[str, Any]) -> Any:
    hints = typing.get_type_hints(cls)
    arguments = {}
    for field in dataclasses.fields(cls):
        key = prefix + field.name
        if dataclasses.is_dataclass(hints[field.name]):
            arguments[field.name] = _assemble(hints[field.name], f"{key}.", values)
        elif key in values:
            arguments[field.name] = values[key]
    return cls(**arguments)
