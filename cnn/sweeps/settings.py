"""The settings of a sweep, which are read as strictly as those of a run. An example of a file:

    search: random
    trials: 20
    space:
      optim.lr: {log: [1e-3, 1.0]}        # between these, uniform on a logarithmic scale
      optim.momentum: {between: [0.5, 0.99]}
      data.batch_size: [32, 64, 128]      # one of these

Nothing here imports torch or Optuna, so that a mistake is reported within a tenth of a second.
"""

import math
import os
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml

from cnn.config import Config, as_text, reader
from cnn.config.hints import suggest_key
from cnn.config.reader import Entry
from cnn.config.settings import FIXED, FREE, SECTIONS, keys_of, plain, setting
from cnn.config.values import describe_node, read_list, read_value
from cnn.errors import InvalidValue, Refused

SEARCHES = ("grid", "random", "tpe")
FORMS = "[a, b, ...], {between: [low, high]} or {log: [low, high]}"
MAX_GRID = 10_000
MAX_CHECKED = 2_000  # combinations that are checked before a sweep starts, a millisecond each

FOLD = "data.fold"  # a sweep that tries nothing else is a cross-validation
# Settings that cannot be in the search space.
NOT_TRIED = {
    "run": "each trial has a run of its own",
    "checkpoint.monitor": "trials are compared by it",
}

# The type of a range's bounds, by the type of the setting.
NUMBER_TYPES = {int: int, int | None: int, float: float, float | None: float}

T = TypeVar("T")


@dataclass(frozen=True)
class SweepConfig:
    """The keys of a sweep's YAML file, with their defaults.

    When a sweep is continued, the values of keys marked FREE may differ from the earlier values.
    The values of keys marked FIXED may not differ.
    """

    name: str | None = setting(
        None, "its trials are the runs NAME_0000, NAME_0001, ...; null: the file's name", FREE
    )
    config: str = setting("config.yaml", "settings of all trials, a file beside this one", FIXED)
    settings: dict[str, Any] = setting({}, "changes to them, for all trials", FIXED)
    search: str = setting(
        "tpe", "all combinations, at random, or led by earlier trials", FIXED, choices=SEARCHES
    )
    trials: int | None = setting(None, "how many; null for grid: all", FREE, least=1)
    seed: int = setting(0, "of the search", FIXED, least=0, most=2**32 - 1)
    prune_after_epochs: int | None = setting(
        None, "from then on a trial below the median is stopped; null: none", FREE, least=1
    )
    storage: str | None = setting(None, "a database's URL; null: logs/sweeps/NAME/study.db", FREE)
    space: dict[str, Any] = setting({}, "the values to try, by key", FIXED)


@dataclass(frozen=True)
class Choice:
    """A list of values for one setting, from which each trial gets one value.

    Attributes:
        values: the values to choose from.
        written: the same values as YAML nodes. Each node has a place, which error messages name.
    """

    values: tuple[Any, ...]
    written: list[Entry] = field(compare=False)

    def __str__(self) -> str:
        return f"[{', '.join(map(as_text, self.values))}]"


@dataclass(frozen=True)
class Range:
    """A range of numbers for one setting, from which each trial gets one number.

    Attributes:
        low: the smallest number that can be chosen. If `low` is an int, only whole numbers are
            chosen.
        high: the largest number that can be chosen, of the same type as `low`.
        log: whether numbers are uniform on a logarithmic scale. If False, the scale is linear.
        written: the two bounds as YAML nodes. Each node has a place, which error messages name.
    """

    low: float
    high: float
    log: bool
    written: list[Entry] = field(compare=False)

    def __str__(self) -> str:
        return f"{'log ' if self.log else ''}{as_text(self.low)} to {as_text(self.high)}"


Space = dict[str, Choice | Range]


@dataclass(frozen=True)
class Sweep:
    """A sweep whose settings have been read and checked.

    Attributes:
        cfg: the values of the sweep's own keys, such as `search` and `trials`.
        name: the name of the sweep. The folder of the sweep is logs/sweeps/NAME. The runs of its
            trials are NAME_0000, NAME_0001 and so on.
        file: the path of the sweep's YAML file.
        base: the settings of train.py that all trials share.
        typed: the settings of train.py that were typed on the command line, such as
            ["train.epochs=3"]. Typed settings hold for all trials.
        space: the values to try, by dotted key such as "optim.lr".
    """

    cfg: SweepConfig
    name: str
    file: Path
    base: Config
    typed: list[str]
    space: Space

    @property
    def monitor(self) -> str:
        """The name of the metric by which trials are compared, such as "val_acc"."""
        return self.base.checkpoint.monitor

    @property
    def is_cross_validation(self) -> bool:
        """Whether the sweep tries nothing but folds."""
        return list(self.space) == [FOLD]

    @property
    def trials(self) -> int:
        """The number of trials in the sweep.

        A grid search has one trial for each combination of the values to try.
        """
        return self.cfg.trials or num_combinations(self.space)

    def run_name(self, number: int) -> str:
        """Returns the name of the run of a trial.

        For example, trial 7 of the sweep "lr" has the run "lr_0007".

        Args:
            number: the index of the trial, from 0.
        """
        return f"{self.name}_{number:04}"

    def combination(self, number: int) -> dict[str, Any]:
        """Returns the values that one trial of a grid search tries.

        Args:
            number: the index of the trial, from 0.

        Returns:
            The values by dotted key, such as {"optim.lr": 0.1}.
        """
        return combination({key: choice.values for key, choice in self.space.items()}, number)


def num_combinations(space: Space) -> int:
    """Returns the number of ways to choose one of the values that are written for each key.

    A range counts as its two bounds.

    Args:
        space: the values to try, by dotted key.
    """
    return math.prod(len(dimension.written) for dimension in space.values())


def combination(options: Mapping[str, Sequence[T]], number: int) -> dict[str, T]:
    """Returns one of the combinations of one value for each key.

    In the order of the combinations, the value of the last key changes fastest. For the options
    {"a": [1, 2], "b": [3, 4, 5]}, combination 1 is {"a": 1, "b": 4}.

    Args:
        options: the values to choose from, by key.
        number: the index of the combination, from 0.

    Returns:
        The chosen values, by key.
    """
    values = {}
    for key in reversed(options):
        number, index = divmod(number, len(options[key]))
        values[key] = options[key][index]
    return values


# -- reading ------------------------------------------------------------------------------------


def load_sweep(path: Path, words: Sequence[str] = ()) -> Sweep:
    """Reads and checks the settings of a sweep and of all its trials.

    Args:
        path: the path of the sweep's YAML file.
        words: the settings typed on the command line, such as ["trials=5", "train.epochs=3"]. A
            setting of the sweep replaces the value in the file. A setting of train.py holds for all
            trials.

    Returns:
        The sweep.

    Raises:
        Refused: the file does not exist, or there are mistakes. The message has one line for each
            mistake.
    """
    if not path.is_file():
        raise Refused(f"{path}: no such file; expected the settings of a sweep")
    mistakes: list[str] = []
    root = reader.compose(reader.read_text(path), str(path))
    entries = reader.read_entries(root, str(path), mistakes)
    typed: dict[str, Entry] = {}
    for word in words:
        typed |= reader.read_override(word, mistakes)
    sweep_keys, run_keys = (dict(keys_of(cls)).keys() for cls in (SweepConfig, Config))
    run_keys -= sweep_keys  # `seed` without a section is the seed of the sweep
    for_trials = {key: item for key, item in typed.items() if "." in key or key in run_keys}
    entries |= {key: item for key, item in typed.items() if key not in for_trials}
    if "space" not in entries and any(key in dict(keys_of(Config)) for key in entries):
        raise Refused(f"{path}: is a file of train.py: python train.py --config {path}")
    cfg = reader.build(SweepConfig, entries, mistakes)
    places = {key: entries[key].where if key in entries else str(path) for key in sweep_keys}
    changes = reader.read_entries(*_mapping(entries, "settings"), mistakes) | for_trials
    of_file = _read_config(path.parent / cfg.config, places["config"], mistakes)
    common = reader.replaced(of_file, changes)
    space = _read_space(*_mapping(entries, "space"), mistakes)
    base, name = reader.build(Config, common, []), cfg.name or path.stem
    if list(space) == [FOLD] and base.data.folds:  # all folds, however many are written
        numbers = yaml.compose(f"{list(range(base.data.folds))}")
        space[FOLD] = _read_dimension(FOLD, numbers, space[FOLD].written[0].where)
    mistakes += _check_sweep(cfg, name, changes, space, places)
    _check_combinations(common, space, mistakes)
    if mistakes:
        raise Refused("\n".join(dict.fromkeys(mistakes)))
    typed_words = [word for word in words if word.partition("=")[0] in for_trials]
    return Sweep(cfg, name, path, base, typed_words, space)


def _read_config(file: Path, where: str, mistakes: list[str]) -> dict[str, Entry]:
    """Reads a YAML file with settings of train.py for all trials.

    Args:
        file: the path of the YAML file.
        where: the place in the sweep's own file that names `file`, such as "a.yaml:4". A message
            reports the place if `file` does not exist.
        mistakes: the list that gets a message for each mistake.

    Returns:
        The entries by dotted key, such as "optim.lr"; {} if the file cannot be read.
    """
    try:
        if os.path.isfile(file):  # Path.is_file raises for a name that no file can have
            return reader.read_file(file, mistakes)
        mistakes.append(f"{where}: config: expected a file beside this one, got {file.name}")
    except Refused as refusal:
        mistakes.append(str(refusal))
    return {}


def _mapping(entries: dict[str, Entry], key: str) -> tuple[yaml.MappingNode, str]:
    """Returns the value of a sweep's key that is a mapping, and the file that contains the value.

    Args:
        entries: the entries of the sweep by key.
        key: "settings" or "space".

    Returns:
        The YAML node, which is empty if the key is missing or the value is not a mapping. The path
        of the file is "command line" for a typed value.
    """
    entry = entries.get(key)
    if entry is None or not isinstance(entry.node, yaml.MappingNode):
        return yaml.MappingNode("tag:yaml.org,2002:map", []), ""
    return entry.node, entry.where.rpartition(":")[0] or entry.where


def _read_space(root: yaml.MappingNode, file: str, mistakes: list[str]) -> Space:
    space: Space = {}
    for key_node, node in root.value:
        key, where = str(key_node.value), reader.place_of(file, key_node)
        try:
            space[key] = _read_dimension(key, node, where)
        except InvalidValue as mistake:
            mistakes.append(f"{where}: {key}{mistake}")
    return space


def _read_dimension(key: str, node: yaml.Node, where: str) -> Choice | Range:
    known = dict(keys_of(Config))
    if key in SECTIONS:
        raise InvalidValue(f": is a section; write {key}.KEY: {FORMS}")
    if key in NOT_TRIED:
        raise InvalidValue(f": cannot be tried: {NOT_TRIED[key]}")
    if key not in known:
        raise InvalidValue(f": no such key{suggest_key(key, known)}")
    kind, metadata = known[key].type, known[key].metadata
    if isinstance(node, yaml.MappingNode):
        return _read_range(node, kind, metadata, where)
    if not isinstance(node, yaml.SequenceNode):
        raise InvalidValue(f": expected {FORMS}, got {describe_node(node)}")
    values = plain(read_list(node, kind, metadata))
    if not values:
        raise InvalidValue(f": expected {FORMS}, got an empty list")
    for index, value in enumerate(values):
        if value in values[:index]:
            raise InvalidValue(f"[{index}]: given twice")
    return Choice(tuple(values), [Entry(item, where) for item in node.value])


def _read_range(
    node: yaml.MappingNode, kind: Any, metadata: Mapping[str, Any], where: str
) -> Range:
    if kind not in NUMBER_TYPES:
        raise InvalidValue(": is not a number; expected [a, b, ...]")
    forms = {str(key.value): bounds for key, bounds in node.value}
    form = ", ".join(forms)  # if there is a single key, this is the key
    bounds = forms.get(form)
    if form not in ("between", "log") or not isinstance(bounds, yaml.SequenceNode):
        raise InvalidValue(f": expected {FORMS}, got {{{form}}}")
    try:
        values = [read_value(bound, NUMBER_TYPES[kind], metadata) for bound in bounds.value]
    except InvalidValue as mistake:
        raise InvalidValue(f".{form}{mistake}") from None
    if len(values) != 2 or values[0] >= values[1]:
        raise InvalidValue(f".{form}: expected [low, high] with low below high, got {values}")
    if form == "log" and values[0] <= 0:
        raise InvalidValue(f".{form}: expected low above 0, got {values[0]}")
    return Range(*values, form == "log", [Entry(bound, where) for bound in bounds.value])


# -- checking -----------------------------------------------------------------------------------


def _check_sweep(
    cfg: SweepConfig, name: str, changes: dict[str, Entry], space: Space, places: dict[str, str]
) -> list[str]:
    """Checks the name of a sweep and whether the settings of the sweep fit together.

    Args:
        cfg: the values of the sweep's own keys, with types and limits checked before.
        name: the name of the sweep.
        changes: the settings of train.py that the sweep changes for all trials, by dotted key.
        space: the values to try, by dotted key.
        places: the place to report for each key of the sweep, such as {"trials": "a.yaml:4"}.

    Returns:
        A message for each mistake.
    """
    is_grid = cfg.search == "grid"
    size, most = num_combinations(space), f"at most {MAX_GRID:,} combinations"
    # Each check: the key, whether its value is right, what was expected, what was found.
    checks = [
        ("name", re.fullmatch(r"[\w\-]{1,100}", name), "letters, digits, '_' and '-'", repr(name)),
        ("space", cfg.space or space, "lines such as `optim.lr: {log: [1e-3, 1.0]}`", "nothing"),
        ("space", not is_grid or size <= MAX_GRID, most, f"{size:,}"),
        ("trials", is_grid or cfg.trials, f"the number of trials for {cfg.search}", "null"),
        ("trials", not is_grid or not cfg.trials, "null, since a grid tries all", cfg.trials),
    ]
    mistakes = [
        f"{places[key]}: {key}: expected {expected}, got {got}"
        for key, is_right, expected, got in checks
        if not is_right
    ]
    for key, change in changes.items():
        if key in space:
            mistakes.append(f"{change.where}: {key}: is in space too; choose one")
        if key == "run":
            mistakes.append(f"{change.where}: {key}: cannot be set: {NOT_TRIED[key]}")
    for key, dimension in space.items():
        if is_grid and isinstance(dimension, Range):
            where = dimension.written[0].where
            mistakes.append(f"{where}: {key}: expected [a, b, ...] for a grid, got {dimension}")
    return mistakes


def _check_combinations(common: dict[str, Entry], space: Space, mistakes: list[str]) -> None:
    """Checks the settings of train.py with the combinations of values to try.

    Only the two bounds of a range are tried. If there are more than 2,000 combinations, a random
    sample of 2,000 is checked.

    Args:
        common: the settings that all trials share, by dotted key.
        space: the values to try, by dotted key.
        mistakes: the list that gets a message for each mistake.
    """
    options = {key: dimension.written for key, dimension in space.items()}
    size, generator = num_combinations(space), random.Random(0)
    indices = range(size)
    if size > MAX_CHECKED:
        indices = [generator.randrange(size) for _ in range(MAX_CHECKED)]
    for index in indices:
        reader.build(Config, reader.replaced(common, combination(options, index)), mistakes)
