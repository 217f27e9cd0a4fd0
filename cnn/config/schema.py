"""Writes configs/schema.json, with which editors complete and check the YAML files.

    python -m cnn.config.schema        after a change to the keys in settings.py

The schema is JSON Schema draft 7, which the YAML language servers of editors support best. It
checks each key on its own; `train.py --print-config` finds mistakes that involve several keys.
"""

import dataclasses
import json
import typing
from collections.abc import Mapping
from pathlib import Path
from types import NoneType
from typing import Any

from cnn.config.reader import RECORDS
from cnn.config.settings import FREE, Config, required_keys
from cnn.config.values import LIMITS, alternatives

FILE = Path(__file__).resolve().parents[2] / "configs" / "schema.json"

NULL = {"type": "null"}
# A text may look like a number or a boolean, as in `data.tag: 2024`. The loader reads it as text.
TEXT: dict[str, Any] = {"type": ["string", "number", "boolean"]}
# This pattern accepts more than the loader does, since \w has only ASCII letters in JSON Schema.
IMPORT_PATH = {"type": "string", "pattern": "^[^:/]+:[^:/]+$"}
SIMPLE_TYPES = {NoneType: [NULL], bool: [{"type": "boolean"}], dict: [{"type": "object"}, NULL]}
NO_SETTINGS: dict[str, Any] = {
    "base": {"type": "string", "description": "a file beside this one, whose settings come first"},
    **{name: {"description": "of an earlier run; skipped"} for name in RECORDS},
}


def schema() -> dict[str, Any]:
    """Returns the JSON Schema of a configuration file, as a dict."""
    top = _mapping(Config)
    top["properties"] |= NO_SETTINGS
    head = {"$schema": "http://json-schema.org/draft-07/schema#", "title": "settings of train.py"}
    return head | top


def text() -> str:
    """Returns the JSON Schema of a configuration file, as indented JSON.

    The text is the content of configs/schema.json.
    """
    return json.dumps(schema(), indent=1, ensure_ascii=False) + "\n"


def _mapping(cls: type, kind: Any = "object", **more: Any) -> dict[str, Any]:
    """Returns the JSON Schema of a dataclass of settings.

    Args:
        cls: the dataclass: Config, or the dataclass of a section or of a list item.
        kind: the types that the schema accepts.
        more: further keywords of the schema.
    """
    properties = {field.name: _key(field) for field in dataclasses.fields(cls)}
    return {"type": kind, "additionalProperties": False, **more, "properties": properties}


def _key(field: dataclasses.Field) -> dict[str, Any]:
    if dataclasses.is_dataclass(field.type):  # YAML reads a section without keys as null
        return _mapping(field.type, ["object", "null"])
    meta = field.metadata
    rule = f" (on a resume: {meta['resume']})" if meta["resume"] != FREE else ""
    result = {"description": meta["description"] + rule} | _any_of(_forms(field.type, meta))
    has_factory = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if has_factory else field.default
    return result if default is dataclasses.MISSING else result | {"default": default}


def _any_of(schemas: list[dict[str, Any]]) -> dict[str, Any]:
    different = [schema for i, schema in enumerate(schemas) if schema not in schemas[:i]]
    return different[0] if len(different) == 1 else {"anyOf": different}


def _forms(kind: Any, meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns a JSON Schema for each form that a setting's value may have.

    Args:
        kind: the type of the setting, such as `int | None`.
        meta: the metadata of the setting, with its choices and limits.
    """
    return [schema for each in alternatives(kind) for schema in _forms_of_one(each, meta)]


def _forms_of_one(kind: Any, meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    origin = typing.get_origin(kind) or kind
    if origin in SIMPLE_TYPES:
        return SIMPLE_TYPES[origin]
    if origin is list:
        (item,) = typing.get_args(kind)
        forms = _item_forms(item) if dataclasses.is_dataclass(item) else _forms(item, meta)
        return [{"type": "array", "items": _any_of(forms)}, NULL]
    if kind is str:
        return _words(meta)
    bounds = {name: meta[key] for key, (_, _, name) in LIMITS.items() if meta[key] is not None}
    return [{"type": "integer" if kind is int else "number"} | bounds]


def _words(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    if meta["pattern"]:
        return [{"type": "string", "pattern": f"^({meta['pattern']})$"}]
    if not meta["choices"]:
        return [TEXT]
    enum = {"enum": list(meta["choices"])}
    return [enum, IMPORT_PATH] if meta["names_code"] else [enum]


def _item_forms(cls: type) -> list[dict[str, Any]]:
    """Returns a JSON Schema for each form that a list item may have.

    One form is a mapping, such as `{name: flip}`. If only the first field of the dataclass lacks a
    default, another form is the value of the first field, such as `flip`.

    Args:
        cls: the dataclass of the item, such as AugmentationConfig.
    """
    fields, required = dataclasses.fields(cls), required_keys(cls)
    short = _forms(fields[0].type, fields[0].metadata) if required == [fields[0].name] else []
    return [*short, _mapping(cls, required=required)]


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8", newline="\n")
