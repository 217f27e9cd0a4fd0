"""Reads the configuration from YAML files and the command line, and reports every mistake in it.

Text is parsed into YAML nodes. The nodes become entries by dotted key, and the entries become the
dataclasses of settings.py. Mistakes in values are collected in a list, so that all of them are
reported together. A file that cannot be read or parsed raises Refused.
"""

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cnn.config.checks import check_config
from cnn.config.hints import suggest_key
from cnn.config.settings import SECTIONS, Config, keys_of, nested, with_values
from cnn.config.values import describe_node, is_null, read_value
from cnn.config.writer import dump
from cnn.errors import InvalidValue, Refused

MAX_CONFIG_BYTES = 100_000  # the files of this project have about 2,000
MAX_DEPTH = 20  # levels of brackets and indents; PyYAML takes minutes for thousands

# Keys of configs/best_hparams/*.yaml that are not settings. They are skipped, so that --config
# accepts such a file.
RECORDS = ("best_metrics", "test_metrics", "updated_at", "history")


@dataclass(frozen=True)
class Entry:
    """The value written for one key, and the place of the value.

    Attributes:
        node: the value as a YAML node.
        where: the place: "FILE:LINE", "command line" or "checkpoint FILE".
    """

    node: yaml.Node
    where: str


# ---------------------------------------------------------------------------------------------
# The whole way, from files and the command line to a Config


def load_config(
    path: Path | None,
    overrides: Sequence[str] = (),
    base: Mapping[str, Any] | None = None,
    base_name: str = "checkpoint ?",
) -> tuple[Config, dict[str, str]]:
    """Reads the settings of a run and checks their values.

    The settings of `overrides` replace the settings of the file. Both replace the settings of
    `base`. A setting that is given nowhere has its default.

    Args:
        path: the path of the YAML file; None for no file. If the file contains the line `base:
            OTHER`, missing settings are taken from the file OTHER.
        overrides: the settings typed on the command line, such as ["optim.lr=0.01"].
        base: the settings of an earlier run, such as {"optim": {"lr": 0.01}}; None for no earlier
            run.
        base_name: the place to report for the settings of `base`, such as "checkpoint a.pth".

    Returns:
        A pair. The first item is the configuration. The second item is a dict with the place of
        each setting that was given, by dotted key. A place is "FILE:LINE", "command line" or
        `base_name`.

    Raises:
        Refused: there are mistakes. The message has one line for each mistake.
    """
    mistakes: list[str] = []
    entries: dict[str, Entry] = {}
    if base is not None:
        entries = read_entries(compose(dump(dict(base)), base_name), base_name, mistakes)
    if path is not None:
        entries = replaced(entries, read_file(path, mistakes))
        if "space" in entries:
            raise Refused(f"{path}: is a file of sweep.py: python sweep.py {path}")
    typed: dict[str, Entry] = {}
    for override in overrides:
        typed |= read_override(override, mistakes)
    entries = replaced(entries, typed)
    cfg = build(Config, entries, mistakes)
    if mistakes:
        raise Refused("\n".join(mistakes))
    return cfg, {key: entry.where for key, entry in entries.items()}


def build(cls: type, entries: dict[str, Entry], mistakes: list[str]) -> Any:
    """Builds a dataclass of settings from entries, and collects the mistakes.

    Args:
        cls: the dataclass, such as Config.
        entries: the values that were given, by dotted key such as "optim.lr".
        mistakes: the list that gets a message for each mistake.

    Returns:
        An instance of the dataclass. A setting without a value or with a wrong value has its
        default.
    """
    known = dict(keys_of(cls))
    values, found = {}, []
    for key, entry in entries.items():
        if key not in known:
            found.append(f"{entry.where}: {key}: no such key{suggest_key(key, known)}")
            continue
        try:
            values[key] = read_value(entry.node, known[key].type, known[key].metadata)
        except InvalidValue as mistake:
            found.append(f"{entry.where}: {key}{mistake}")
    cfg = with_values(cls(), **nested(values))
    if cls is Config and not found:
        places = {key: f"{entry.where}: {key}" for key, entry in entries.items()}
        found += check_config(cfg, lambda key: places.get(key, key))
    mistakes += found
    return cfg


# ---------------------------------------------------------------------------------------------
# Files and words of the command line as entries


def read_file(path: Path, mistakes: list[str], seen: tuple[Path, ...] = ()) -> dict[str, Entry]:
    """Reads the entries of a YAML file and of its base file.

    The key `base` of a file names the base file. If both files give the same key, the base file's
    value is ignored.

    Args:
        path: the path of the file.
        mistakes: the list that gets a message for each mistake, such as a repeated key.
        seen: the absolute paths of the files that led to `path` by their key `base`; () for none.

    Returns:
        The entries by dotted key, such as "optim.lr".

    Raises:
        Refused: a file cannot be read or parsed, or the files name each other in a circle.
    """
    if path.resolve() in seen:
        raise Refused(f"{path}: base: the files name each other in a circle")
    entries = read_entries(compose(read_text(path), str(path)), str(path), mistakes)
    entries = {key: entry for key, entry in entries.items() if key not in RECORDS}
    base = entries.pop("base", None)
    if base is None:
        return entries
    base_path = path.parent / str(base.node.value)
    # os.path.isfile returns False for a name that no file can have, where Path.is_file raises.
    if not isinstance(base.node, yaml.ScalarNode) or not os.path.isfile(base_path):
        got = describe_node(base.node)
        raise Refused(f"{base.where}: base: expected a file beside this one, got {got}")
    return replaced(read_file(base_path, mistakes, (*seen, path.resolve())), entries)


def replaced(entries: dict[str, Entry], later: dict[str, Entry]) -> dict[str, Entry]:
    """Returns the entries, with later ones in their place.

    The arguments of a model, dataset or other named thing belong to its name. If `later` gives
    another name, such as "model.name", and no "model.args", the earlier arguments are left out.

    Args:
        entries: the entries by dotted key.
        later: the entries that replace those with the same key.
    """
    renamed = {key for key in entries.keys() & later.keys() if key.endswith(".name")}
    renamed = {key for key in renamed if entries[key].node.value != later[key].node.value}
    old = {key.removesuffix("name") + "args" for key in renamed}
    return {key: entry for key, entry in entries.items() if key not in old} | later


def read_text(path: Path) -> str:
    """Reads a configuration file as text.

    Args:
        path: the path of the file.

    Raises:
        Refused: the file cannot be read, has more than 100,000 bytes, or is not UTF-8.
    """
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_CONFIG_BYTES + 1)  # a device such as /dev/zero has no end
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", error)
        message = f"{path}: cannot read the configuration ({reason}); choose a file with --config"
        raise Refused(message) from None
    if len(data) > MAX_CONFIG_BYTES:
        size = f"more than {MAX_CONFIG_BYTES:,} bytes"
        raise Refused(f"{path}: expected a configuration, got a file of {size}")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # Unlike `data`, error.object has no byte-order mark.
        line = error.object[: error.start].count(b"\n") + 1
        byte = f"the byte {error.object[error.start]:#04x}"
        raise Refused(f"{path}:{line}: expected UTF-8 text, got {byte}; save it as UTF-8") from None


def read_override(text: str, mistakes: list[str]) -> dict[str, Entry]:
    """Reads one setting typed on the command line, such as "optim.lr=0.01".

    Args:
        text: the typed word.
        mistakes: the list that gets a message for a mistake. Mistakes are a word that does not have
            the form `key=value`, and a key that is a section such as "optim".

    Returns:
        A dict with the entry by its dotted key; {} after a mistake.

    Raises:
        Refused: the value begins with a bracket, a brace or a quote, and is not valid YAML.
    """
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        mistakes.append(f"command line: expected section.key=value, got {text!r}")
        return {}
    if key in SECTIONS:
        mistakes.append(f"command line: {key}: is a section; write {key}.KEY=value")
        return {}
    if value[:1] in ("[", "{", "'", '"') and not (key == "run" and value[0] == "{"):
        node = compose(value, f"command line: {key}")
    else:  # not parsed as YAML, since a path may contain ': ' or ' #'
        node = yaml.ScalarNode("tag:yaml.org,2002:str", value.strip())
    return {key: Entry(node, "command line")}


def read_entries(root: yaml.Node | None, where: str, mistakes: list[str]) -> dict[str, Entry]:
    """Returns the entries of a YAML document by dotted key, such as "optim.lr".

    Args:
        root: the top node of the document; None for an empty document.
        where: the place to report: the path of the file, or "checkpoint FILE".
        mistakes: the list that gets a message for each mistake. Mistakes are a key that is given
            twice, and a section that is neither empty nor a mapping.

    Raises:
        Refused: the document is not a mapping.
    """
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        expected, got = "`section:` and `key: value` lines", describe_node(root)
        raise Refused(f"{place_of(where, root)}: expected {expected}, got {got}")
    items = []
    for key_node, node in root.value:
        section = key_node.value
        items.append((section, key_node, node))
        if section in SECTIONS and isinstance(node, yaml.MappingNode):
            items += [(f"{section}.{inner.value}", inner, value) for inner, value in node.value]
    entries: dict[str, Entry] = {}
    first: dict[str, str] = {}
    for key, key_node, node in items:
        place = place_of(where, key_node)
        if key in first:
            mistakes.append(f"{place}: {key}: given twice, first at {first[key]}")
        first.setdefault(key, place)
        if key not in SECTIONS:
            entries[key] = Entry(node, place)
        elif not isinstance(node, yaml.MappingNode) and not is_null(node):
            mistakes.append(f"{place}: {key}: expected a section of keys below")
    return entries


# ---------------------------------------------------------------------------------------------
# Text as YAML nodes


class _Composer(yaml.SafeLoader):
    """A parser that turns YAML text into nodes.

    The parser raises Refused for YAML that a configuration does not need: anchors, aliases, tags,
    nesting deeper than 20 levels, and keys that are lists or mappings.

    Args:
        text: the YAML document.
        where: the place to report: the file's path, "checkpoint FILE" or "command line: KEY".
    """

    def __init__(self, text: str, where: str):
        super().__init__(text)
        self.where, self.depth = where, 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        event = self.peek_event()
        place = place_of(self.where, event)
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            raise Refused(f"{place}: anchors and aliases (& *) are not allowed")
        if event.tag not in (None, "!"):
            raise Refused(f"{place}: tags (!) are not allowed, got {event.tag}")
        if self.depth == MAX_DEPTH and isinstance(event, yaml.CollectionStartEvent):
            raise Refused(f"{place}: nested deeper than {MAX_DEPTH} levels")
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode):
                place, got = place_of(self.where, key), describe_node(key)
                raise Refused(f"{place}: expected a plain key, got {got}")
        return node


def compose(text: str, where: str) -> yaml.Node | None:
    """Parses YAML text into a tree of nodes.

    Args:
        text: the YAML document.
        where: the place to report: the file's path, "checkpoint FILE" or "command line: KEY".

    Returns:
        The top node; None for an empty document.

    Raises:
        Refused: the text is not valid YAML, or is nested deeper than 20 levels. Anchors, aliases,
            tags, and keys that are lists or mappings are refused too.
    """
    try:
        return _Composer(text, where).get_single_node()
    except yaml.MarkedYAMLError as error:
        line, reason, start = error.problem_mark.line + 1, error.problem, error.context_mark
        if start:
            reason += f" ({error.context}, which starts in line {start.line + 1})"
    except yaml.reader.ReaderError as error:
        line = text[: error.position].count("\n") + 1
        reason = f"the character {error.character:#x}; write UTF-8 without control characters"
    raise Refused(f"{_at_line(where, line)}: not valid YAML: {reason}")


def place_of(where: str, thing: Any) -> str:
    """Returns the place of a YAML node or event, such as "configs/a.yaml:4".

    Args:
        where: the path of the file, to which the line number is appended. The texts "checkpoint
            FILE" and "command line: KEY" are returned unchanged.
        thing: the node or event. The line number is that of its first line.
    """
    return _at_line(where, thing.start_mark.line + 1)


def _at_line(where: str, line: int) -> str:
    return where if where.startswith(("checkpoint ", "command line")) else f"{where}:{line}"
