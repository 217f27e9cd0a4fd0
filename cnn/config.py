"""The settings of a run: frozen dataclasses, mirrored by a strictly checked YAML file.

Every key stands here once, with its type, default, limits, meaning, and what a resume makes of a
change to it. Nothing here imports torch, so that a typo is answered at once.
"""

import dataclasses
import difflib
import re
import types
import typing
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

MAX_CONFIG_BYTES = 100_000  # the files shipped have about 2,000
MAX_DEPTH = 20  # of brackets and indents; PyYAML takes minutes for some thousands

# What configs/best_hparams/*.yaml hold beside the settings; read past, so that --config takes them.
RECORDS = ("best_metrics", "test_metrics", "updated_at", "history")

# Files and folders of the run without a name, which share a folder with the runs that have one; as
# in cnn.utils.run, which takes longer to import than a typo may.
NAMES_TAKEN = (
    *("train.log", "history.csv", "config.yaml", "model.txt", "tensorboard", "report.html"),
    *("curves.png", "confusion_matrix.png", "predictions_val.csv", "result.json", "archive"),
    "sweeps",  # of sweep.py
)
ENDINGS_TAKEN = (".pth", ".pt2", ".pt", ".onnx", ".tmp")

# What a resume makes of a key that differs from the checkpoint's.
FREE = "taken"  # may change: paths, workers, epochs
ASKED = "taken only when typed on the command line"  # changes the mathematics: lr, loss
FIXED = "cannot change"  # what the weights or the order of the images rest on

# What may name code of the user's own, as package.module:name.
CODE_KEYS = ("data.name", "data.augment", "model.name", "loss.name")

LIMITS = {"least": "of at least", "above": "above", "most": "at most", "below": "below"}
IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")
DEVICE = re.compile(r"auto|cpu|mps|cuda(:\d+)?")


class Refused(ValueError):
    """What the user asked for cannot be done; the message says where, why and what to do."""


def setting(
    default: Any,
    about: str,
    *,
    resume: str,
    choices: tuple[str, ...] = (),
    import_path: bool = False,
    pattern: str | None = None,
    least: float | None = None,
    above: float | None = None,
    most: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that knows its meaning, its limits and what a resume makes of it."""
    metadata = {
        "about": about,
        "resume": resume,
        "choices": choices,
        "import_path": import_path,
        "pattern": pattern,
        "least": least,
        "above": above,
        "most": most,
        "below": below,
    }
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


DATA_NAMES = (
    "digits",
    "synthetic",
    "mnist",
    "fashion_mnist",
    "kmnist",
    "cifar10",
    "cifar100",
    "svhn",
    "folder",
    "csv",
)
AUGMENTATIONS = ("crop", "flip", "rotate", "color", "resized_crop", "erase")


@dataclass(frozen=True)
class DataConfig:
    name: str = setting(
        "digits", "what to train on", resume=FIXED, choices=DATA_NAMES, import_path=True
    )
    root: str = setting("data", "where the files are; for csv, the file", resume=FREE)
    download: bool = setting(False, "fetch missing files of a known set", resume=FREE)
    args: dict[str, Any] = setting({}, "further keywords for synthetic or your own", resume=FIXED)
    batch_size: int = setting(64, "images a batch, over all processes", resume=FIXED, least=1)
    num_workers: int = setting(0, "loader processes, 0 for none", resume=FREE, least=0)
    val_fraction: float = setting(
        0.1, "share of train held out where there is no val", resume=FIXED, above=0, below=1
    )
    test_fraction: float = setting(
        0.2, "share held out where there is no test", resume=FIXED, above=0, below=1
    )
    limit: int | None = setting(None, "use only that many training images", resume=FIXED, least=1)
    sampler: str = setting(
        "shuffle",
        "every image once an epoch, or as many drawn with each class equally often",
        resume=FIXED,
        choices=("shuffle", "balanced"),
    )
    image_size: int | None = setting(
        None, "side in pixels to resize and crop to; null: the data's own", resume=FIXED, least=1
    )
    channels: int | None = setting(
        None, "1 gray, 3 colour; null: the data's own", resume=FIXED, least=1, most=3
    )
    augment: list[str] = setting(
        [],
        "random changes to training images",
        resume=ASKED,
        choices=AUGMENTATIONS,
        import_path=True,
    )
    in_memory: bool | str = setting(
        "auto",
        "keep decoded images in memory: auto where they fit",
        resume=FIXED,
        choices=("auto",),
    )
    on_bad_image: str = setting(
        "stop", "when a file does not decode", resume=FIXED, choices=("stop", "skip")
    )
    tag: str | None = setting(None, "a word for what the data is, for file names", resume=FREE)


@dataclass(frozen=True)
class ModelConfig:
    name: str = setting(
        "simple_cnn",
        "simple_cnn, lenet5, resnet9, resnet20, a torchvision model, or package.module:Class",
        resume=FIXED,
    )
    args: dict[str, Any] = setting({}, "further keywords for the model", resume=FIXED)
    pretrained: bool = setting(
        False, "begin from torchvision's weights (downloads them)", resume=FREE
    )
    weights: str | None = setting(
        None, "file with weights to begin from, instead of a download", resume=FREE
    )


@dataclass(frozen=True)
class LossConfig:
    name: str = setting(
        "cross_entropy",
        "what is minimised: cross_entropy, or package.module:Class",
        resume=ASKED,
        choices=("cross_entropy",),
        import_path=True,
    )
    label_smoothing: float = setting(
        0.0, "share of the target spread over all classes", resume=ASKED, least=0, below=1
    )
    class_weights: str | list[float] | None = setting(
        None,
        "balanced (by the training counts), or a number a class",
        resume=ASKED,
        choices=("balanced",),
        above=0,
    )
    args: dict[str, Any] = setting({}, "further keywords for your own loss", resume=ASKED)


@dataclass(frozen=True)
class GroupConfig:
    """Parameters whose name matches, with a learning rate of their own."""

    match: str = dataclasses.field(metadata={"about": "regular expression", "resume": ASKED})
    lr_scale: float = dataclasses.field(
        metadata={"about": "factor on optim.lr; 0 freezes", "resume": ASKED, "least": 0}
    )


@dataclass(frozen=True)
class OptimConfig:
    name: str = setting(
        "sgd",
        "an optimizer of torch.optim",
        resume=FIXED,
        choices=("sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adamax"),
    )
    lr: float = setting(0.05, "learning rate at its highest", resume=ASKED, above=0)
    momentum: float = setting(0.9, "of sgd and rmsprop", resume=ASKED, least=0, below=1)
    weight_decay: float = setting(
        5e-4, "on weights; biases and norms have none", resume=ASKED, least=0
    )
    groups: list[GroupConfig] = setting([], "own lr by parameter name", resume=FIXED)
    freeze: str | None = setting(
        None, "regular expression: parameters that stay as they are at first", resume=FIXED
    )
    freeze_epochs: int = setting(0, "for that many epochs", resume=ASKED, least=0)
    args: dict[str, Any] = setting({}, "further keywords for the optimizer", resume=ASKED)


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = setting(
        "cosine",
        "how lr changes",
        resume=FIXED,
        choices=("constant", "step", "multistep", "cosine", "onecycle", "plateau"),
    )
    warmup_epochs: float = setting(
        0.0, "linear rise from 0 first, a step at a time; not for onecycle", resume=ASKED, least=0
    )
    gamma: float = setting(
        0.1, "factor of step, multistep and plateau", resume=ASKED, above=0, below=1
    )
    step_epochs: int = setting(30, "step: epochs between two drops", resume=ASKED, least=1)
    milestones: list[int] = setting([], "multistep: epochs of the drops", resume=ASKED, least=1)
    patience: int = setting(
        5, "plateau: epochs without improvement before a drop", resume=ASKED, least=0
    )
    min_lr: float = setting(0.0, "cosine, plateau: never below", resume=ASKED, least=0)


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = setting(30, "passes over the training images", resume=FREE, least=1)
    precision: str = setting(
        "auto", "of the arithmetic", resume=ASKED, choices=("auto", "fp32", "bf16", "fp16")
    )
    compile: bool = setting(False, "torch.compile the model", resume=ASKED)
    deterministic: bool = setting(False, "CUDA: repeatable kernels only", resume=ASKED)
    sync_batchnorm: bool = setting(
        False, "several GPUs: BatchNorm over the whole batch, not each one's share", resume=ASKED
    )
    clip_grad_norm: float | None = setting(
        None, "largest norm of the gradient", resume=ASKED, above=0
    )
    accumulate: int = setting(1, "batches an optimizer step", resume=FIXED, least=1)
    ema_decay: float | None = setting(
        None, "average the weights: share kept a step, 0.999 say", resume=ASKED, above=0, below=1
    )
    early_stop_patience: int | None = setting(
        None, "stop after that many epochs without improvement", resume=FREE, least=1
    )


# Of the validation; f1 is the mean over the classes, and so is auc, but of two classes class 1's.
MONITORED = (
    *("val_acc", "val_loss", "val_balanced_acc", "val_f1", "val_auc", "val_log_loss", "val_ece"),
    *("val_sensitivity", "val_specificity"),  # of two classes; class 1 is the positive one
)


@dataclass(frozen=True)
class CheckpointConfig:
    monitor: str = setting("val_acc", "what best.pth is best in", resume=FIXED, choices=MONITORED)
    every_epochs: int | None = setting(
        None, "keep epoch_005.pth and so on every so many epochs", resume=FREE, least=1
    )
    every_minutes: float | None = setting(
        5.0, "save last.pth within an epoch that often", resume=FREE, above=0
    )
    every_steps: int | None = setting(
        None, "save last.pth within an epoch every so many steps", resume=FREE, least=1
    )


@dataclass(frozen=True)
class LogConfig:
    every_seconds: float = setting(
        30.0, "off a terminal, a line that often within an epoch", resume=FREE, above=0
    )
    report: bool = setting(True, "logs/report.html and figures; needs matplotlib", resume=FREE)
    tensorboard: bool = setting(
        False, "event files in logs/tensorboard; needs tensorboard", resume=FREE
    )


@dataclass(frozen=True)
class Config:
    seed: int = setting(0, "the run is a function of it", resume=FIXED, least=0, most=2**63 - 1)
    run: str | None = setting(None, "name: logs/NAME/ and checkpoints/NAME/", resume=FREE)
    device: str = setting(
        "auto", "auto, cpu, cuda, cuda:1, mps", resume=FREE, pattern=DEVICE.pattern
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


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
        text = yaml.dump(dict(base), Dumper=_Dumper, allow_unicode=True)
        given |= _flatten(_compose(text, "checkpoint"), "checkpoint", mistakes)
    if path is not None:
        given |= _read_file(path, mistakes)
    for override in overrides:
        given |= _read_override(override, mistakes)
    cfg = _build(Config, "", given, mistakes)
    if not mistakes:
        mistakes += _check_together(cfg, given)
    if mistakes:
        raise Refused("\n".join(mistakes))
    return cfg, {key: item.where for key, item in given.items()}


def to_dict(cfg: Any) -> dict[str, Any]:
    """The configuration as plain nested values, as the YAML file would give them."""
    return dataclasses.asdict(cfg)


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


class _Dumper(yaml.SafeDumper):
    """Quotes every text that would not come back as text: PyYAML takes 1e-3 for one."""

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def represent_text(self, text: str) -> yaml.Node:
        plain = self.represent_scalar("tag:yaml.org,2002:str", text)
        if not isinstance(_plain(plain), str) or _is_null(plain):
            plain.style = "'"
        return plain


_Dumper.add_representer(str, _Dumper.represent_text)


def _yaml_line(field: dataclasses.Field, value: Any, indent: str) -> str:
    choices = field.metadata["choices"]
    if len(choices) > 1:  # one alone is a word beside numbers or paths: its meaning tells it
        path = ["package.module:name"] if field.metadata["import_path"] else []
        choices = ": " + ", ".join([*choices, *path])
    else:
        choices = ""
    about = field.metadata["about"] + choices
    return f"{indent}{field.name}: {as_text(value)}".ljust(32) + f"  # {about}"


def as_text(value: Any) -> str:
    """A value as it is written after `key:`, or typed after `key=`, and read back the same."""
    if isinstance(value, list):
        value = [dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in value]
    # Inside [ ] every value comes out on one line, whatever it is.
    text = yaml.dump(
        [value], Dumper=_Dumper, default_flow_style=True, allow_unicode=True, width=10**9
    )
    return text.strip()[1:-1]


def replaced(cfg: Config, **sections: Any) -> Config:
    """The configuration with some values replaced: `replaced(cfg, run="a", train={"epochs": 3})`."""
    changed = {
        name: dataclasses.replace(getattr(cfg, name), **value) if name in SECTIONS else value
        for name, value in sections.items()
    }
    return dataclasses.replace(cfg, **changed)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` as `{"optim.lr": 1}`; what stands below section.key is one value."""
    result = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not prefix:
            result |= flat(value, f"{key}.")
        else:
            result[prefix + key] = value
    return result


def import_paths(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The code that nested settings name: key and package.module:name."""
    found = []
    for key in CODE_KEYS:
        value = flat(values).get(key)
        names = value if isinstance(value, list) else [value]
        found += [(key, name) for name in names if isinstance(name, str) and is_import_path(name)]
    return found


def resume_rules() -> dict[str, str]:
    """For each dotted key, what a resume makes of a change: FREE, ASKED or FIXED."""
    return {key: field.metadata["resume"] for key, field, _ in _keys(Config)}


def _keys(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from _keys(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, kind


def _read_file(path: Path, mistakes: list[str], seen: tuple[Path, ...] = ()) -> dict[str, Given]:
    if path.resolve() in seen:
        raise Refused(f"{path}: base: the files name each other in a circle")
    root = _compose(_read_text(path), str(path))
    given = _flatten(root, str(path), mistakes)
    given = {key: item for key, item in given.items() if key not in RECORDS}
    base = given.pop("base", None)
    if base is None:
        return given
    base_path = path.parent / str(base.node.value)
    try:
        found = isinstance(base.node, yaml.ScalarNode) and base_path.is_file()
    except (OSError, ValueError):  # a name that no file can have
        found = False
    if not found:
        shown = _shown(base.node)
        raise Refused(f"{base.where}: base: expected a file beside this one, got {shown}")
    return _read_file(base_path, mistakes, (*seen, path.resolve())) | given


def _read_text(path: Path) -> str:
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


def _read_override(text: str, mistakes: list[str]) -> dict[str, Given]:
    key, equals, value = text.partition("=")
    if not equals or not re.fullmatch(r"[\w.]+", key):
        mistakes.append(f"command line: expected section.key=value, got {text!r}")
        return {}
    if key in SECTIONS:
        mistakes.append(f"command line: {key}: is a section; write {key}.KEY=value")
        return {}
    if value[:1] in ("[", "{", "'", '"'):
        node = _compose(value, f"command line: {key}")
    else:  # the shell's word as it is: a path may hold ': ' or ' #'
        node = yaml.ScalarNode("tag:yaml.org,2002:str", value.strip())
    return {key: Given(node, "command line")}


def _compose(text: str, where: str) -> yaml.Node | None:
    """Parses YAML into nodes; refuses what a configuration has no use for."""
    depth = 0
    try:
        for event in yaml.parse(text, yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent)
            depth -= isinstance(event, yaml.CollectionEndEvent)
            if depth > MAX_DEPTH:
                raise Refused(f"{_at(where, event)}: nested deeper than {MAX_DEPTH} levels")
            if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
                raise Refused(f"{_at(where, event)}: anchors and aliases (& *) are not allowed")
            tag = getattr(event, "tag", None)
            if tag not in (None, "!"):
                raise Refused(f"{_at(where, event)}: tags (!) are not allowed, got {tag}")
        root = yaml.compose(text, yaml.SafeLoader)
        _check_keys(root, where)
        return root
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


def _check_keys(node: yaml.Node | None, where: str) -> None:
    """Refuses keys that are lists or mappings."""
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise Refused(f"{_at(where, key)}: expected a plain key, got {_shown(key)}")
            _check_keys(value, where)
    elif isinstance(node, yaml.SequenceNode):
        for item in node.value:
            _check_keys(item, where)


def _at(where: str, thing: Any) -> str:
    return _at_line(where, thing.start_mark.line + 1)


def _at_line(where: str, line: int) -> str:
    return where if where.startswith(("command line", "checkpoint")) else f"{where}:{line}"


def _flatten(root: yaml.Node | None, where: str, mistakes: list[str]) -> dict[str, Given]:
    """The file's keys as section.key, with duplicates and misplaced values told."""
    if root is None:
        return {}
    if not isinstance(root, yaml.MappingNode):
        raise Refused(
            f"{_at(where, root)}: expected `section:` and `key: value` lines, got {_shown(root)}"
        )
    given: dict[str, Given] = {}
    first: dict[str, str] = {}

    def add(key: str, key_node: yaml.Node, node: yaml.Node) -> None:
        if key in first:
            mistakes.append(f"{_at(where, key_node)}: {key}: given twice, first at {first[key]}")
        first[key] = _at(where, key_node)

    for key_node, node in root.value:
        section = str(key_node.value)
        add(section, key_node, node)
        if section not in SECTIONS:
            given[section] = Given(node, _at(where, key_node))
        elif isinstance(node, yaml.MappingNode):
            for inner_key, inner in node.value:
                key = f"{section}.{inner_key.value}"
                add(key, inner_key, inner)
                given[key] = Given(inner, _at(where, inner_key))
        elif not _is_null(node):
            mistakes.append(f"{_at(where, key_node)}: {section}: expected a section of keys below")
    return given


def _build(cls: type, prefix: str, given: dict[str, Given], mistakes: list[str]) -> Any:
    """Makes the dataclass from what was given; collects every mistake."""
    known = {key: (field, kind) for key, field, kind in _keys(cls, prefix)}
    values: dict[str, Any] = {}
    for key, item in given.items():
        if key not in known:
            hint = _suggest(key, known)
            mistakes.append(f"{item.where}: {key}: no such key{hint}")
            continue
        field, kind = known[key]
        try:
            values[key] = _read(item.node, kind, field.metadata)
        except _Mistake as mistake:
            mistakes.append(f"{item.where}: {key}{mistake}")
    return _assemble(cls, prefix, values)


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


def _suggest(word: str, known: typing.Iterable[str]) -> str:
    """— did you mean 'x'? for the nearest known word, or nothing."""
    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:  # the right key in the wrong section
        near = [name for name in known if name.split(".")[-1] == word.split(".")[-1]][:1]
    return f" — did you mean '{near[0]}'?" if near else ""


# ---------------------------------------------------------------------------------------------
# One value


class _Mistake(Exception):
    """What was expected and what came; begins with the rest of the key, or with ': '."""


def _read(node: yaml.Node, kind: Any, meta: Mapping[str, Any]) -> Any:
    alternatives = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if types.NoneType in alternatives and _is_null(node):
        return None
    if isinstance(node, yaml.SequenceNode):
        for alternative in alternatives:
            if typing.get_origin(alternative) is list:
                return _read_list(node, typing.get_args(alternative)[0], meta)
    elif isinstance(node, yaml.MappingNode):
        if typing.get_origin(kind) is dict:
            return _plain(node)
    elif (typing.get_origin(kind) in (list, dict)) and _is_null(node):
        return typing.get_origin(kind)()
    else:
        for alternative in alternatives:
            try:
                value = _read_scalar(node, alternative)
            except ValueError:
                continue
            if _allowed(value, meta):
                return value
    raise _Mistake(f": expected {_expected(kind, meta)}, got {_shown(node)}{_near(node, meta)}")


def _read_list(node: yaml.SequenceNode, kind: Any, meta: Mapping[str, Any]) -> list[Any]:
    values = []
    for number, item in enumerate(node.value):
        try:
            if dataclasses.is_dataclass(kind):
                values.append(_read_group(item, kind))
            else:
                values.append(_read(item, kind, meta))
        except _Mistake as mistake:
            raise _Mistake(f"[{number}]{mistake}") from None
    return values


def _read_group(node: yaml.Node, cls: type) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    names = ", ".join(fields)
    if not isinstance(node, yaml.MappingNode):
        raise _Mistake(f": expected {{{names}}}, got {_shown(node)}")
    values = {}
    for key_node, item in node.value:
        key = str(key_node.value)
        if key not in fields:
            raise _Mistake(f".{key}: no such key{_suggest(key, fields)}")
        if key in values:
            raise _Mistake(f".{key}: given twice")
        try:
            values[key] = _read(item, typing.get_type_hints(cls)[key], fields[key].metadata)
        except _Mistake as mistake:
            raise _Mistake(f".{key}{mistake}") from None
    missing = [name for name in fields if name not in values]
    if missing:
        raise _Mistake(f".{missing[0]}: missing; expected {{{names}}}")
    return cls(**values)


def _read_scalar(node: yaml.Node, kind: Any) -> Any:
    """The value of a scalar as a bool, int, float or str; ValueError where it is none."""
    text = str(node.value)
    if kind is str:
        if _is_null(node) or any(unicodedata.category(char) in ("Cc", "Cs") for char in text):
            raise ValueError  # control characters and half characters are in no name
        return text
    if getattr(node, "style", None) in ("'", '"'):
        raise ValueError
    if kind is bool:
        return {"true": True, "false": False}.get(text.lower()) if _is_bool(text) else _no()
    if kind is int and re.fullmatch(r"[+-]?[0-9][0-9_]{0,30}", text):
        value = int(text.replace("_", ""))
        return value if abs(value) < 2**63 else _no()
    if kind is float and re.fullmatch(
        r"[+-]?([0-9][0-9_]*\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]+)?", text
    ):
        value = float(text.replace("_", ""))
        return value if abs(value) != float("inf") else _no()
    return _no()


def _no() -> typing.NoReturn:
    raise ValueError


def _is_bool(text: str) -> bool:
    return text.lower() in ("true", "false")


def _is_null(node: yaml.Node) -> bool:
    return (
        isinstance(node, yaml.ScalarNode)
        and node.style not in ("'", '"')
        and node.value.lower() in ("", "null", "~")
    )


def _plain(node: yaml.Node) -> Any:
    """A free value (for args): null, bool, int, float, text, lists and mappings of these."""
    if isinstance(node, yaml.SequenceNode):
        return [_plain(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        keys = [str(key.value) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            twice = next(key for key in keys if keys.count(key) > 1)
            raise _Mistake(f".{twice}: given twice")
        return {key: _plain(item) for key, (_, item) in zip(keys, node.value)}
    if _is_null(node):
        return None
    for kind in (bool, int, float):
        try:
            return _read_scalar(node, kind)
        except ValueError:
            pass
    try:
        return _read_scalar(node, str)
    except ValueError:
        raise _Mistake(f": expected plain values, got {_shown(node)}") from None


def _allowed(value: Any, meta: Mapping[str, Any]) -> bool:
    if isinstance(value, str):
        known = meta.get("choices")
        return not known or value in known or (meta["import_path"] and is_import_path(value))
    if isinstance(value, bool):
        return True
    return (
        (meta.get("least") is None or value >= meta["least"])
        and (meta.get("above") is None or value > meta["above"])
        and (meta.get("most") is None or value <= meta["most"])
        and (meta.get("below") is None or value < meta["below"])
    )


def is_import_path(text: str) -> bool:
    """Whether the text reads package.module:name."""
    return IMPORT_PATH.fullmatch(text) is not None


def _expected(kind: Any, meta: Mapping[str, Any]) -> str:
    if isinstance(kind, types.UnionType):
        return " or ".join(_expected(part, meta) for part in typing.get_args(kind))
    if kind is types.NoneType:
        return "null"
    if typing.get_origin(kind) is list:
        (inner,) = typing.get_args(kind)
        return f"a list [a, b] of {_expected(inner, meta)}"
    if typing.get_origin(kind) is dict:
        return "a mapping {key: value}"
    if dataclasses.is_dataclass(kind):
        return "{" + ", ".join(field.name for field in dataclasses.fields(kind)) + "}"
    if kind is bool:
        return "true or false"
    if kind is str:
        path = ["package.module:name"] if meta.get("import_path") else []
        words = [*meta.get("choices", ()), *path]
        return ("one of " if len(words) > 1 else "") + ", ".join(words) if words else "text"
    name = "a whole number" if kind is int else "a number"
    limits = [
        f"{word} {meta[limit]}" for limit, word in LIMITS.items() if meta.get(limit) is not None
    ]
    return " ".join([name, " and ".join(limits)]).strip()


def _shown(node: yaml.Node) -> str:
    if isinstance(node, yaml.SequenceNode):
        return "a list"
    if isinstance(node, yaml.MappingNode):
        return "a mapping"
    if _is_null(node):
        return "nothing" if node.value == "" else "null"
    text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    return (
        ascii(text) if not text.isprintable() else repr(text) if node.style in ("'", '"') else text
    )


def _near(node: yaml.Node, meta: Mapping[str, Any]) -> str:
    if isinstance(node, yaml.ScalarNode) and meta.get("choices"):
        near = difflib.get_close_matches(node.value.lower(), meta["choices"], n=1, cutoff=0.6)
        return f" — did you mean '{near[0]}'?" if near else ""
    return ""


def _check_together(cfg: Config, given: dict[str, Given]) -> list[str]:
    """The mistakes that only show between keys."""

    def at(key: str) -> str:
        return f"{given[key].where}: {key}" if key in given else key

    mistakes = []
    if not DEVICE.fullmatch(cfg.device):
        mistakes.append(
            f"{at('device')}: expected auto, cpu, cuda, cuda:1 or mps, got {cfg.device}"
        )
    if cfg.run is not None and not re.fullmatch(r"[\w\-][\w.\- ]*", cfg.run):
        mistakes.append(
            f"{at('run')}: expected a name of letters, digits, '.', '_' and '-' that begins with no"
            f" '.', got {cfg.run!r}"
        )
    elif cfg.run is not None and _is_taken(cfg.run):
        mistakes.append(
            f"{at('run')}: expected a name for folders, got {cfg.run!r}, which a file of the run"
            f" without a name may have"
        )
    if cfg.schedule.name == "multistep" and not cfg.schedule.milestones:
        mistakes.append(
            f"{at('schedule.milestones')}: missing; multistep needs the epochs, such as [30, 60]"
        )
    if cfg.data.sampler == "balanced" and cfg.loss.class_weights == "balanced":
        mistakes.append(
            f"{at('loss.class_weights')}: balanced cannot go with data.sampler: balanced, rare"
            f" classes would count twice over; choose one"
        )
    patterns = {
        f"{at('optim.groups')}[{number}].match": group.match
        for number, group in enumerate(cfg.optim.groups)
    }
    for where, pattern in (patterns | {at("optim.freeze"): cfg.optim.freeze or ""}).items():
        try:
            re.compile(pattern)
        except re.error as error:
            mistakes.append(f"{where}: not a regular expression: {error}")
    return mistakes


def _is_taken(name: str) -> bool:
    name = name.lower()  # there are disks that take Archive for archive
    return name in NAMES_TAKEN or name.endswith(ENDINGS_TAKEN)


SECTIONS = tuple(
    field.name
    for field in dataclasses.fields(Config)
    if dataclasses.is_dataclass(typing.get_type_hints(Config)[field.name])
)
