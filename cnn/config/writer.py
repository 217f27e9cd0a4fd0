"""Settings as text: YAML that `--config` takes again, values as they are typed."""

import contextlib
import dataclasses
import typing
from typing import Any

import yaml

from cnn.config.settings import Config, plain
from cnn.config.values import choices_of, is_null, plain_value
from cnn.errors import InvalidValue


def to_yaml(cfg: Config) -> str:
    """The whole configuration as YAML that `--config` takes again, a comment for each key."""
    lines = []
    for field in dataclasses.fields(Config):
        value = getattr(cfg, field.name)
        if dataclasses.is_dataclass(value):
            lines += ["", f"{field.name}:"]
            lines += [
                _yaml_line(f, getattr(value, f.name), "  ") for f in dataclasses.fields(value)
            ]
        else:
            lines.append(_yaml_line(field, value, ""))
    return "\n".join(lines) + "\n"


def _yaml_line(field: dataclasses.Field, value: Any, indent: str) -> str:
    meta = field.metadata
    for item in typing.get_args(field.type):
        if dataclasses.is_dataclass(item):  # a list of mappings, of which the first key has choices
            meta = (
                meta | dataclasses.fields(item)[0].metadata | {"description": meta["description"]}
            )
    words = choices_of(meta)
    # One choice alone is a word beside numbers or paths: its meaning tells it.
    choices = f": {', '.join(words)}" if len(words) > 1 else ""
    return (
        f"{indent}{field.name}: {as_text(value)}".ljust(32) + f"  # {meta['description']}{choices}"
    )


def as_text(value: Any) -> str:
    """A value as it is written after `key:`, or typed after `key=`, and read back the same."""
    # Inside [ ] every value comes out on one line, whatever it is.
    return dump([plain(value)], default_flow_style=True, width=10**9).strip()[1:-1]


def dump(values: Any, **options: Any) -> str:
    """Plain values as YAML that reads back the same."""
    return yaml.dump(values, Dumper=_Dumper, allow_unicode=True, **options)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would not come back as text: PyYAML takes 1e-3 for one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        node = self.represent_scalar("tag:yaml.org,2002:str", text)
        with contextlib.suppress(
            InvalidValue
        ):  # of control characters, which YAML escapes by itself
            if not isinstance(plain_value(node), str) or is_null(node):
                node.style = "'"
        return node


_Dumper.add_representer(str, _Dumper.represent_text)
