"""Writes a configuration as a YAML file, and single values as text."""

import contextlib
import dataclasses
from typing import Any

import yaml

from cnn.config.settings import Config, item_fields, plain
from cnn.config.values import choices_of, is_null, plain_value
from cnn.errors import InvalidValue


def to_yaml(cfg: Config) -> str:
    """Returns a configuration as the text of a YAML file.

    Each key has a comment. The option --config of train.py accepts the file.
    """
    lines = []
    for field in dataclasses.fields(Config):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            inner = [_yaml_line(f, getattr(value, f.name), "  ") for f in dataclasses.fields(value)]
            lines += ["", f"{field.name}:", *inner]
        else:
            lines.append(_yaml_line(field, value, ""))
    return "\n".join(lines) + "\n"


def _yaml_line(field: dataclasses.Field, value: Any, indent: str) -> str:
    # For a list of mappings, the choices belong to the first key of the mappings.
    words = choices_of([*item_fields(field.type), field][0].metadata)
    # A single choice, such as auto, is accepted besides other values; the description explains it.
    choices = f": {', '.join(words)}" if len(words) > 1 else ""
    comment = f"  # {field.metadata['description']}{choices}"
    return f"{indent}{field.name}: {as_text(value)}".ljust(32) + comment


def as_text(value: Any) -> str:
    """Returns a value as one line of YAML.

    The line can be written after `key:` in a file, or typed after `key=` on the command line.
    Examples are "0.01" for a number and "[30, 60]" for a list.

    Args:
        value: the value of a setting.
    """
    # PyYAML writes the items of a flow-style list on one line, whatever their types.
    return dump([plain(value)], default_flow_style=True, width=10**9).strip()[1:-1]


def dump(values: Any, **options: Any) -> str:
    """Returns plain values as YAML text.

    This project's reader reads the same values from the text.

    Args:
        values: a dict, list, number, text, boolean or None. Dicts and lists may be nested.
        options: further keyword arguments for yaml.dump.
    """
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, **options)


class _Dumper(yaml.SafeDumper):
    """A YAML dumper that quotes any text that looks like another type.

    An example is the text "1e-3", which PyYAML itself leaves unquoted.
    """

    def ignore_aliases(self, _data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        node = self.represent_scalar("tag:yaml.org,2002:str", text)
        # plain_value refuses control characters, which PyYAML quotes and escapes by itself.
        with contextlib.suppress(InvalidValue):
            if not isinstance(plain_value(node), str) or is_null(node):
                node.style = "'"
        return node


_Dumper.add_representer(str, _Dumper.represent_text)
