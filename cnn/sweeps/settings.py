"""The settings of a sweep: what is tried, how and how often; read as strictly as those of a run.

    search: random
    trials: 20
    space:
      optim.lr: {log: [1e-3, 1.0]}        # between these, evenly over the powers of ten
      optim.momentum: {between: [0.5, 0.99]}
      data.batch_size: [32, 64, 128]      # one of these

Nothing here imports torch or Optuna, so that a typo is answered at once.
"""

import itertools
import math
import os
import re
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from cnn.config import Config, as_text
from cnn.config.reader import (
    Entry,
    build,
    compose,
    place_of,
    read_entries,
    read_file,
    read_override,
    read_text,
)
from cnn.config.settings import FIXED, FREE, SECTIONS, keys_of, plain, setting
from cnn.config.values import describe_node, read_list, read_value, suggest
from cnn.errors import InvalidValue, Refused

SEARCHES = ("grid", "random", "tpe")
FORMS = "[a, b, ...], {between: [low, high]} or {log: [low, high]}"
MAX_GRID = 10_000
MAX_CHECKED = 2_000  # combinations; each takes a millisecond

# What a sweep itself decides.
NOT_TRIED = {
    "run": "each trial has a run of its own",
    "checkpoint.monitor": "it is what the trials are compared by",
}


@dataclass(frozen=True)
class SweepConfig:
    """The file's keys; `resume` is whether a sweep that goes on may have another value."""

    name: str | None = setting(
        None, "its trials are the runs NAME_0000, NAME_0001, ...; null: the file's", FREE
    )
    config: str = setting("config.yaml", "settings to begin from, a file beside this one", FIXED)
    settings: dict[str, Any] = setting({}, "what is changed in them, for all trials", FIXED)
    search: str = setting(
        "tpe", "all combinations, at random, or led by earlier trials", FIXED, choices=SEARCHES
    )
    trials: int | None = setting(None, "how many; null for grid: all", FREE, least=1)
    seed: int = setting(0, "of the search", FIXED, least=0, most=2**32 - 1)
    prune_after_epochs: int | None = setting(
        None, "a trial below the median is stopped, from then on; null: none", FREE, least=1
    )
    storage: str | None = setting(None, "a database's URL; null: logs/sweeps/NAME/study.db", FREE)
    space: dict[str, Any] = setting({}, "what is tried, by key", FIXED)


@dataclass(frozen=True)
class Choice:
    """One of these."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"[{', '.join(map(as_text, self.values))}]"


@dataclass(frozen=True)
class Range:
    """Between two numbers, whole ones if these are."""

    low: float
    high: float
    log: bool  # evenly over the powers of ten

    def __str__(self) -> str:
        return f"{'log ' if self.log else ''}{as_text(self.low)} to {as_text(self.high)}"


@dataclass(frozen=True)
class Sweep:
    """A sweep whose every mistake would have been told."""

    cfg: SweepConfig
    name: str
    file: Path
    base: Config  # what the trials have in common
    typed: tuple[str, ...]  # key=value of the command line, for all trials
    space: dict[str, Choice | Range]

    @property
    def monitor(self) -> str:
        """What the trials are compared by, as the epochs of each are."""
        return self.base.checkpoint.monitor

    @property
    def trials(self) -> int:
        # None is for a grid alone, which tries all combinations
        return self.cfg.trials or math.prod(len(tried.values) for tried in self.space.values())

    def run_of(self, number: int) -> str:
        return f"{self.name}_{number:04}"

    def combination(self, number: int) -> dict[str, Any]:
        """The grid's values for a trial; the last key changes fastest."""
        values = {}
        for key, choice in reversed(self.space.items()):
            number, place = divmod(number, len(choice.values))
            values[key] = choice.values[place]
        return values


# -- reading ------------------------------------------------------------------------------------


def load_sweep(path: Path, words: Sequence[str] = ()) -> Sweep:
    """Reads the file, the settings that it begins from, and holds all that may come against them.

    Args:
        words: `key=value`; the sweep's own keys, any others are settings of all trials.

    Raises:
        Refused: with every mistake, a line each.
    """
    mistakes: list[str] = []
    if not path.is_file():
        raise Refused(f"{path}: no such file; expected one that says what is tried")
    text = read_text(path)
    given = read_entries(compose(text, str(path)), str(path), mistakes)
    own_keys, settings_keys = ({key for key, _, _ in keys_of(cls)} for cls in (SweepConfig, Config))
    own, typed = [], {}
    for word in words:
        for key, item in read_override(word, mistakes).items():
            if key in own_keys:
                given[key] = item
            elif key in settings_keys:
                typed[key] = item
                own.append(word)
            else:
                hint = suggest(key, own_keys | settings_keys)
                mistakes.append(f"{item.where}: {key}: no such key{hint}")
    cfg = build(SweepConfig, given, mistakes)
    common = _read_config(path, cfg, given.get("config"), mistakes)
    common |= _read_settings(given.get("settings"), path, mistakes) | typed
    space = dict(_read_space(given.get("space"), path, mistakes))
    mistakes += _check_sweep(cfg, common, space, given, path)
    if mistakes:
        build(Config, common, mistakes)
    else:
        mistakes += _check_combinations(common, {key: nodes for key, (_, nodes) in space.items()})
    if mistakes:
        raise Refused("\n".join(dict.fromkeys(mistakes)))
    base = build(Config, common, [])
    dimensions = {key: dimension for key, (dimension, _) in space.items()}
    return Sweep(cfg, cfg.name or path.stem, path, base, tuple(own), dimensions)


def _read_config(
    path: Path, cfg: SweepConfig, given: Entry | None, mistakes: list[str]
) -> dict[str, Entry]:
    """The settings to begin from."""
    file = path.parent / cfg.config
    if not os.path.isfile(file):  # False for a name that no file can have, where Path raises
        where = given.where if given else str(path)
        mistakes.append(f"{where}: config: expected a file beside this one, got {cfg.config}")
        return {}
    try:
        return read_file(file, mistakes)
    except Refused as refusal:
        mistakes.append(str(refusal))
        return {}


def _read_settings(given: Entry | None, path: Path, mistakes: list[str]) -> dict[str, Entry]:
    """What is changed for all trials, `train.epochs: 3` or `train: {epochs: 3}`."""
    if given is None or not isinstance(given.node, yaml.MappingNode):
        return {}
    return read_entries(given.node, _file_of(given, path), mistakes)


def _read_space(
    given: Entry | None, path: Path, mistakes: list[str]
) -> Iterator[tuple[str, tuple[Choice | Range, list[Entry]]]]:
    """For each key what is tried, with the values themselves, or the bounds, as they are written."""
    if given is None or not isinstance(given.node, yaml.MappingNode):
        return
    known = {key: (field, kind) for key, field, kind in keys_of(Config)}
    seen: set[str] = set()
    for key_node, node in given.node.value:
        key, where = str(key_node.value), place_of(_file_of(given, path), key_node)
        if key in SECTIONS:
            mistakes.append(f"{where}: {key}: is a section; write {key}.KEY: {FORMS}")
        elif key in NOT_TRIED:
            mistakes.append(f"{where}: {key}: cannot be tried: {NOT_TRIED[key]}")
        elif key not in known:
            mistakes.append(f"{where}: {key}: no such key{suggest(key, known)}")
        elif key in seen:
            mistakes.append(f"{where}: {key}: given twice")
        else:
            seen.add(key)
            field, kind = known[key]
            read = _read_range if isinstance(node, yaml.MappingNode) else _read_choice
            try:
                dimension, nodes = read(node, kind, field.metadata)
            except InvalidValue as mistake:
                mistakes.append(f"{where}: {key}{mistake}")
                continue
            yield key, (dimension, [Entry(inner, where) for inner in nodes])


def _read_choice(
    node: yaml.Node, kind: Any, meta: typing.Mapping[str, Any]
) -> tuple[Choice, list[yaml.Node]]:
    if not isinstance(node, yaml.SequenceNode) or not node.value:
        got = describe_node(node) if not isinstance(node, yaml.SequenceNode) else "an empty list"
        raise InvalidValue(f": expected {FORMS}, got {got}")
    values = plain(read_list(node, kind, meta))
    for number, value in enumerate(values):
        if value in values[:number]:
            raise InvalidValue(f"[{number}]: given twice")
    return Choice(tuple(values)), node.value


def _read_range(
    node: yaml.MappingNode, kind: Any, meta: typing.Mapping[str, Any]
) -> tuple[Range, list[yaml.Node]]:
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    number = next((one for one in (int, float) if one in kinds), None)
    if number is None:
        raise InvalidValue(": is no number that could be between two; expected [a, b, ...]")
    forms = {str(key.value): value for key, value in node.value}
    (form, bounds), *more = forms.items() or [("", node)]
    if more or form not in ("between", "log") or not isinstance(bounds, yaml.SequenceNode):
        raise InvalidValue(f": expected {FORMS}, got {{{', '.join(forms)}}}")
    if len(bounds.value) != 2:
        raise InvalidValue(f".{form}: expected [low, high], got {len(bounds.value)} values")
    try:
        low, high = (read_value(bound, number, meta) for bound in bounds.value)
    except InvalidValue as mistake:
        raise InvalidValue(f".{form}{mistake}") from None
    if not low < high:
        raise InvalidValue(f".{form}: expected low below high, got {low} and {high}")
    if form == "log" and low <= 0:
        raise InvalidValue(f".{form}: expected low above 0, got {low}")
    return Range(low, high, form == "log"), bounds.value


def _file_of(given: Entry, path: Path) -> str:
    return "command line" if given.where == "command line" else str(path)


# -- checking -----------------------------------------------------------------------------------


def _check_sweep(
    cfg: SweepConfig,
    common: dict[str, Entry],
    space: dict[str, tuple[Choice | Range, list[Entry]]],
    given: dict[str, Entry],
    path: Path,
) -> list[str]:
    """The mistakes that only show between the sweep's keys."""

    def at(key: str) -> str:
        return f"{given[key].where if key in given else path}: {key}"

    mistakes = []
    name = cfg.name or path.stem
    if not re.fullmatch(r"[\w\-]{1,100}", name):
        mistakes.append(f"{at('name')}: expected letters, digits, '_' and '-', got {name!r}")
    if not space and not cfg.space:
        mistakes.append(f"{at('space')}: expected lines such as `optim.lr: {{log: [1e-3, 1.0]}}`")
    here = {key: item.where for key, item in common.items() if _is_of_sweep(item, path)}
    for key in here.keys() & space.keys():
        mistakes.append(f"{here[key]}: {key}: is in space too; choose one")
    if "run" in here:
        mistakes.append(f"{here['run']}: run: cannot be set: {NOT_TRIED['run']}")
    if cfg.search != "grid":
        if cfg.trials is None:
            mistakes.append(f"{at('trials')}: missing; {cfg.search} needs how many")
        return mistakes
    for key, (dimension, nodes) in space.items():
        if isinstance(dimension, Range):
            mistakes.append(f"{nodes[0].where}: {key}: a grid needs its values: [a, b, ...]")
    if cfg.trials is not None:
        mistakes.append(f"{at('trials')}: expected null, a grid tries all, got {cfg.trials}")
    size = math.prod(len(nodes) for _, nodes in space.values())
    if size > MAX_GRID:
        mistakes.append(f"{at('space')}: expected at most {MAX_GRID:,} combinations, got {size:,}")
    return mistakes


def _is_of_sweep(given: Entry, path: Path) -> bool:
    """Whether it was given by the sweep, and not by the file that it begins from."""
    return given.where == "command line" or given.where.startswith(f"{path}:")


def _check_combinations(common: dict[str, Entry], space: dict[str, list[Entry]]) -> list[str]:
    """What is wrong with any of the settings that may come, a range standing for its two bounds.

    Where these are too many, with each value on its own, beside the first ones of the others.
    """
    if math.prod(map(len, space.values())) <= MAX_CHECKED:
        combinations = [dict(zip(space, values)) for values in itertools.product(*space.values())]
    else:
        first = {key: values[0] for key, values in space.items()}
        combinations = [first | {key: value} for key in space for value in space[key]]
    mistakes: list[str] = []
    for combination in combinations:
        build(Config, common | combination, mistakes)
    return mistakes
