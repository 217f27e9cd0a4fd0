"""Writes docs/settings.md and docs/zh/settings.md: every key with its default and meaning.

    python docs/settings.py        after a change to the keys in cnn/config/settings.py

What stands above the first table is kept, and so are the meanings in docs/zh/settings.md, where a
new key gets an empty one.
"""

import dataclasses
import re
import sys
from collections.abc import Iterator
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path.insert(0, str(DOCS.parent))

from cnn.config.settings import (  # noqa: E402
    ASKED,
    FIXED,
    FREE,
    Config,
    item_fields,
)
from cnn.config.values import alternatives, choices_of  # noqa: E402
from cnn.config.writer import as_text  # noqa: E402

RESUME = {
    "en": {FREE: "may change", ASKED: "if typed", FIXED: "cannot change"},
    "zh": {FREE: "可以改", ASKED: "写明才改", FIXED: "不能改"},
}
COLUMNS = {
    "en": "| key | default | values | meaning | on a resume |",
    "zh": "| 参数 | 默认值 | 取值 | 含义 | 续训时 |",
}
TOP = {"en": "Top level", "zh": "顶层"}
SIGNS = {"least": "≥", "above": ">", "most": "≤", "below": "<"}
PAGES = {"en": DOCS / "settings.md", "zh": DOCS / "zh/settings.md"}


def page(language: str) -> str:
    """Returns the page in a language, en or zh, made anew from the settings and the old page."""
    old = PAGES[language].read_text(encoding="utf-8")
    chinese, top = meanings(old), []
    parts = [old[: old.index("\n## ")]]
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            rows = list(_rows(section.type, f"{section.name}.", language, chinese))
            parts.append(_table(f"`{section.name}`", rows, language))
        else:
            top.append(_row(section, section.name, language, chinese))
    parts.insert(1, _table(TOP[language], top, language))
    return "\n".join(parts)


def _table(title: str, rows: list[str], language: str) -> str:
    return "\n".join([f"## {title}", "", COLUMNS[language], "|---|---|---|---|---|", *rows, ""])


def _rows(cls: type, prefix: str, language: str, chinese: dict[str, str]) -> Iterator[str]:
    for field in dataclasses.fields(cls):
        yield _row(field, prefix + field.name, language, chinese)
        for item in item_fields(field.type):
            yield _row(item, f"{prefix}{field.name}[].{item.name}", language, chinese)


def _row(field: dataclasses.Field, key: str, language: str, chinese: dict[str, str]) -> str:
    made = field.default_factory is not dataclasses.MISSING
    default = field.default_factory() if made else field.default
    shown = "" if default is dataclasses.MISSING else f"`{as_text(default)}`"
    meaning = field.metadata["description"] if language == "en" else chinese.get(key, "")
    resume = RESUME[language][field.metadata["resume"]]
    return f"| `{key}` | {shown} | {_values(field)} | {meaning} | {resume} |"


def _values(field: dataclasses.Field) -> str:
    """Returns the choices and limits of a key."""
    either = ["true", "false"] if bool in alternatives(field.type) else []
    words = [f"`{word}`" for word in [*choices_of(field.metadata), *either]]
    limits = {name: field.metadata[name] for name in SIGNS if field.name != "seed"}
    words += [f"{SIGNS[name]} {limit}" for name, limit in limits.items() if limit is not None]
    return ", ".join(words)


def meanings(text: str) -> dict[str, str]:
    """Returns the meanings that a page has, by key."""
    rows = re.findall(r"^\| `([^`]+)` \| .* \| ([^|]*) \| [^|]+ \|$", text, re.MULTILINE)
    return {key: meaning.strip() for key, meaning in rows}


if __name__ == "__main__":
    for language, path in PAGES.items():
        path.write_text(page(language), encoding="utf-8", newline="\n")
