"""configs/schema.json, by which editors complete and underline the YAML files.

    python -m cnn.config.schema        writes it anew, after a change to the keys in settings.py

JSON Schema draft 7, which the editors' YAML language servers know best. It says of each key alone
what settings.py says; what only shows between keys, `train.py --print-config` tells.
"""

import dataclasses
import json
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from cnn.config.reader import RECORDS
from cnn.config.settings import FREE, Config, required_keys

FILE = Path(__file__).resolve().parents[2] / "configs" / "schema.json"

BOUNDS = {
    "least": "minimum",
    "above": "exclusiveMinimum",
    "most": "maximum",
    "below": "exclusiveMaximum",
}
# The loader takes a word for text that is a number or a switch to YAML: data.tag: 2024
TEXT: dict[str, Any] = {"type": ["string", "number", "boolean"]}
# Wider than the loader's own: JSON Schema's \w knows no letters but the English ones.
IMPORT_PATH = {"type": "string", "pattern": "^[^:/]+:[^:/]+$"}
OTHERS: dict[str, Any] = {
    "base": {"type": "string", "description": "a file beside this one, whose settings come first"},
    **{name: {"description": "of an earlier run; read past"} for name in RECORDS},
}


def schema() -> dict[str, Any]:
    """The schema of a configuration file."""
    top = _section(Config)
    top["properties"] |= OTHERS
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "settings of train.py"}
    return head | top


def text() -> str:
    """The schema as the file has it."""
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def _section(cls: type) -> dict[str, Any]:
    """The schema of a dataclass's keys; a section may be empty, and then is null to YAML."""
    hints = typing.get_type_hints(cls)
    properties = {}
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        is_section = dataclasses.is_dataclass(kind)
        properties[field.name] = _section(kind) if is_section else _key(field, kind)
    return {
        "type": "object" if cls is Config else ["object", "null"],
        "additionalProperties": False,
        "properties": properties,
    }


def _key(field: dataclasses.Field, kind: Any) -> dict[str, Any]:
    meta = field.metadata
    description = meta["description"]
    if meta["resume"] != FREE:
        description += f" (on a resume: {meta['resume']})"
    result = {"description": description} | _any_of(_alternatives(kind, meta))
    if field.default_factory is not dataclasses.MISSING:
        result["default"] = field.default_factory()
    elif field.default is not dataclasses.MISSING:
        result["default"] = field.default
    return result


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    different = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]
    return different[0] if len(different) == 1 else {"anyOf": different}


def _alternatives(kind: Any, meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What a value of that type may be, one schema each."""
    if isinstance(kind, types.UnionType):
        return [schema for part in typing.get_args(kind) for schema in _alternatives(part, meta)]
    null = {"type": "null"}
    if kind is types.NoneType:
        return [null]
    if typing.get_origin(kind) is dict:
        return [{"type": "object"}, null]
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        items = _mapping(inner) if dataclasses.is_dataclass(inner) else _alternatives(inner, meta)
        return [{"type": "array", "items": _any_of(items)}, null]
    if kind is bool:
        return [{"type": "boolean"}]
    if kind is str:
        return _words(meta)
    bounds = {name: meta[limit] for limit, name in BOUNDS.items() if meta[limit] is not None}
    return [{"type": "integer" if kind is int else "number"} | bounds]


def _words(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    if meta["pattern"]:
        return [{"type": "string", "pattern": f"^({meta['pattern']})$"}]
    if not meta["choices"]:
        return [TEXT]
    enum = {"enum": list(meta["choices"])}
    return [enum, IMPORT_PATH] if meta["names_code"] else [enum]


def _mapping(cls: type) -> list[dict[str, Any]]:
    """Of a list of mappings; of those that need one key alone, its value may stand for it."""
    hints, required = typing.get_type_hints(cls), required_keys(cls)
    keys = {field.name: _key(field, hints[field.name]) for field in dataclasses.fields(cls)}
    first = dataclasses.fields(cls)[0]
    short = _alternatives(hints[first.name], first.metadata) if required == [first.name] else []
    head = {"type": "object", "additionalProperties": False, "required": required}
    return [*short, head | {"properties": keys}]


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8", newline="\n")
