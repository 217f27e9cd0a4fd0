"""The settings of a run: frozen dataclasses that mirror the sections of a YAML file.

Every key is defined once, with its type, default, limits and meaning, and with how a resume, a
comparison of runs and a dry run treat it. Nothing here imports torch, so that a mistake in the
settings is reported in a tenth of a second.
"""

import copy
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

# What a resume does with a key whose value differs from the checkpoint's.
FREE = "taken"  # may change: paths, workers, epochs
ASKED = "taken only when typed on the command line"  # changes the mathematics: lr, loss
FIXED = "cannot change"  # the weights or the order of the images depend on it

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# The further metadata that `setting` takes, with their defaults.
METADATA: dict[str, Any] = {
    "experiment": None,  # whether another value makes another experiment; None: if not FREE
    "scratch": ...,  # the value in a dry run or drill; Ellipsis leaves it unchanged
    "names_code": False,  # whether package.module:name is accepted too
    "choices": (),
    "pattern": None,  # regular expression that the whole text must match
    **dict.fromkeys(("least", "above", "most", "below")),  # limits of a number
}


def setting(default: Any, description: str, resume: str, **more: Any) -> Any:
    """Returns a dataclass field whose metadata describe one setting.

    Args:
        default: the default value; MISSING if the user must give a value.
        description: the meaning of the setting, for --print-config and for editors.
        resume: what a resume does with a value that differs from the checkpoint's value. FREE means
            that the value is taken, ASKED that a value typed on the command line is taken, and
            FIXED that the value is refused.
        more: further metadata, such as least=1. The names are the keys of the dict METADATA.
    """
    assert more.keys() <= METADATA.keys(), f"expected {list(METADATA)}, got {list(more)}"
    facts = {"description": description, "resume": resume, "experiment": resume != FREE}
    metadata = METADATA | facts | more
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------------
# The keys. The package that implements a choice has its name and function in a table. A test
# compares the tables with these names.

KNOWN_DATASETS = ("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn")
DATA_NAMES = ("digits", "synthetic", *KNOWN_DATASETS, "folder", "csv")
LAYOUTS = ("auto", "classes", "splits")
FITS = ("crop", "pad", "stretch")
DECODINGS = ("scaled", "full")
SAMPLERS = ("shuffle", "balanced")
DUPLICATES = ("drop", "keep", "stop", "ignore")
# The arguments of each augmentation. An import path takes `args` instead.
AUGMENTATIONS: dict[str, tuple[str, ...]] = {
    "crop": ("padding",),
    "flip": ("probability",),
    "vflip": ("probability",),
    "rotate": ("degrees",),
    "color": ("brightness", "contrast", "saturation"),
    "resized_crop": ("scale", "ratio"),
    "erase": ("probability", "side"),
    "randaugment": ("num_ops", "magnitude"),
    "trivialaugment": (),
}
MODEL_NAMES = ("simple_cnn", "lenet5", "resnet9", "resnet20", "efficientnet_lite0")
MODEL_FORMS = (
    f"{', '.join(MODEL_NAMES)}, torchvision's such as resnet18, timm:NAME, or module:Class"
)
PARTS = ("head", "backbone", "body")  # body is another word for backbone
OPTIMIZERS = ("sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adamax")
LOSSES = ("cross_entropy",)
SCHEDULES = ("constant", "step", "multistep", "cosine", "onecycle", "plateau")
TRACKERS = ("mlflow",)
PRECISIONS = ("auto", "fp32", "bf16", "fp16")
# f1 and auc are means over the classes. With two classes, auc belongs to class 1, the positive one.
METRICS = ("acc", "loss", "balanced_acc", "f1", "auc", "log_loss", "ece")
BINARY_METRICS = ("sensitivity", "specificity")  # with two classes only
SHARE = {"above": 0, "below": 1}  # the limits of a share that is neither nothing nor all
MONITORED = tuple(f"val_{name}" for name in METRICS + BINARY_METRICS)


@dataclass(frozen=True)
class AugmentationConfig:
    """A random change to training images.

    In YAML, the change is written as a name such as `flip`, or as a mapping such as `{name:
    resized_crop, scale: [0.5, 1]}`.
    """

    name: str = setting(
        MISSING, "name of the augmentation", ASKED, choices=AUGMENTATIONS, names_code=True
    )
    scale: list[float] | None = setting(
        None, "range of the share of the area", ASKED, above=0, most=1
    )
    ratio: list[float] | None = setting(
        None, "range of width / height", ASKED, least=0.01, most=100
    )
    padding: int | None = setting(None, "black pixels on each side", ASKED, least=1, most=512)
    probability: float | None = setting(None, "share of the images", ASKED, least=0, most=1)
    side: float | None = setting(
        None, "side of the square, as a share of the image's side", ASKED, above=0, most=1
    )
    degrees: float | None = setting(None, "largest angle", ASKED, least=0, most=180)
    brightness: float | None = setting(None, "factor drawn from 1 ± this", ASKED, least=0, most=10)
    contrast: float | None = setting(None, "as brightness", ASKED, least=0, most=10)
    saturation: float | None = setting(None, "as brightness", ASKED, least=0, most=10)
    num_ops: int | None = setting(None, "augmentations in a row", ASKED, least=1, most=100)
    magnitude: int | None = setting(None, "strength of the augmentations", ASKED, least=0, most=30)
    args: dict[str, Any] | None = setting(None, "keyword arguments of your own augmentation", ASKED)

    def arguments(self) -> dict[str, Any]:
        """Returns the arguments that were given, by name."""
        return {name: value for name, value in list(vars(self).items())[1:] if value is not None}


@dataclass(frozen=True)
class DataConfig:
    """The settings of the dataset, of its split, and of the loading of images."""

    name: str = setting("digits", "dataset", FIXED, choices=DATA_NAMES, names_code=True)
    root: str = setting("data", "folder of the files; for csv, the file", FREE, experiment=True)
    layout: str = setting("auto", "what the folders in root are", FIXED, choices=LAYOUTS)
    download: bool = setting(False, "download missing files of a known dataset", FREE)
    args: dict[str, Any] = setting({}, "keyword arguments of synthetic or your own dataset", FIXED)
    batch_size: int = setting(64, "images per batch, over all processes", FIXED, least=1)
    num_workers: int = setting(0, "DataLoader workers, 0 for none", FREE, least=0, most=1024)
    val_fraction: float = setting(0.1, "share of train held out if there is no val", FIXED, **SHARE)
    test_fraction: float = setting(0.2, "share held out if there is no test", FIXED, **SHARE)
    limit: int | None = setting(None, "use only this many training images", FIXED, least=1)
    drop_last: bool = setting(False, "leave out the last batch of an epoch if not full", FIXED)
    sampler: str = setting(
        "shuffle", "each image once, or each class equally often", FIXED, choices=SAMPLERS
    )
    image_size: int | None = setting(
        None, "side in pixels to resize and crop to; null: the data's own", FIXED, least=1
    )
    fit: str = setting("crop", "how an image is made square", FIXED, choices=FITS)
    channels: int | None = setting(
        None, "1 gray, 3 colour; null: the data's own", FIXED, least=1, most=3
    )
    augment: list[AugmentationConfig] = setting([], "data augmentation of training images", ASKED)
    in_memory: bool | str = setting(
        "auto", "keep decoded images in memory; auto: if they fit", FIXED, choices=("auto",)
    )
    decode: str = setting(
        "scaled", "JPEG files: in full, or only to the pixels needed", FIXED, choices=DECODINGS
    )
    cache_gb: float | None = setting(
        None, "size limit of the image cache; null: a quarter of the free space", FREE, least=0
    )
    value_range: list[float] | None = setting(
        None, "values mapped to black and white; null: found if images have more than 8 bits", FIXED
    )
    on_bad_image: str = setting("stop", "if an image is broken", FIXED, choices=("stop", "skip"))
    on_duplicate: str = setting(
        "drop", "copies in several splits; ignore: do not look for them", FIXED, choices=DUPLICATES
    )
    verify: bool = setting(False, "read every file again, even if it looks unchanged", FREE)
    positive: str | None = setting(
        None, "the positive class of two; null: the second by name", FIXED
    )
    group: str | None = setting(
        None, "regular expression on paths: what it finds names a group to keep together", FIXED
    )
    folds: int | None = setting(None, "folds of the training images", FIXED, least=2)
    fold: int | None = setting(None, "fold that is the test set, from 0 on", FIXED, least=0)
    tag: str | None = setting(None, "name of the data, for file names", FREE, experiment=True)


@dataclass(frozen=True)
class ModelConfig:
    """The settings of the network and of its initial weights."""

    name: str = setting("simple_cnn", MODEL_FORMS, FIXED, names_code=True)
    args: dict[str, Any] = setting({}, "keyword arguments of the model", FIXED)
    pretrained: bool = setting(False, "weights pretrained on ImageNet", FREE, experiment=True)
    weights: str | None = setting(None, "file of weights to start from", FREE, experiment=True)
    partial_weights: bool = setting(False, "load the weights that fit, ignore the rest", FREE)


@dataclass(frozen=True)
class LossConfig:
    """The settings of the loss function."""

    name: str = setting("cross_entropy", "loss function", ASKED, choices=LOSSES, names_code=True)
    label_smoothing: float = setting(
        0.0, "share of the target spread over all classes", ASKED, least=0, below=1
    )
    class_weights: str | list[float] | None = setting(
        None, "balanced (by counts), or a number per class", ASKED, choices=("balanced",), above=0
    )
    args: dict[str, Any] = setting({}, "keyword arguments of your own loss", ASKED)


@dataclass(frozen=True, kw_only=True)
class GroupConfig:
    """A factor on the learning rate of some parameters.

    The factor applies to the parameters of a part of the model, or to all parameters whose names
    match a regular expression.
    """

    part: str | None = setting(
        None, "head, or the rest: backbone (body is the same)", ASKED, choices=PARTS
    )
    match: str | None = setting(None, "regular expression for names", ASKED)
    lr_scale: float = setting(MISSING, "factor on optim.lr; 0 freezes", ASKED, least=0)


@dataclass(frozen=True)
class OptimConfig:
    """The settings of the optimizer, such as its learning rates and the frozen parameters."""

    name: str = setting("sgd", "optimizer", FIXED, choices=OPTIMIZERS, names_code=True)
    lr: float = setting(0.05, "highest learning rate", ASKED, above=0)
    momentum: float = setting(0.9, "for sgd and rmsprop", ASKED, least=0, below=1)
    weight_decay: float = setting(5e-4, "on weights; biases and norms have none", ASKED, least=0)
    groups: list[GroupConfig] = setting([], "learning rates of parts of the model", FIXED)
    layer_decay: float = setting(
        1.0, "factor on the learning rate per layer, from the head down", FIXED, above=0, most=1
    )
    freeze: str | None = setting(
        None, "to be frozen at first: head, a regular expression, or null: backbone", FIXED
    )
    freeze_epochs: int = setting(0, "epochs to freeze them for", ASKED, least=0)
    args: dict[str, Any] = setting({}, "keyword arguments of the optimizer", ASKED)


@dataclass(frozen=True)
class ScheduleConfig:
    """The settings of the schedule by which the learning rate changes during training."""

    name: str = setting("cosine", "learning rate schedule", FIXED, choices=SCHEDULES)
    warmup_epochs: float = setting(
        0.0, "linear rise from 0 first, per step; not for onecycle", ASKED, least=0, most=10**6
    )
    warmup_steps: int | None = setting(
        None, "the rise in optimizer steps, in place of warmup_epochs", ASKED, least=0
    )
    gamma: float = setting(0.1, "factor of step, multistep and plateau", ASKED, **SHARE)
    step_epochs: int = setting(30, "step: epochs between two drops", ASKED, least=1)
    milestones: list[int] = setting([], "multistep: epochs of the drops", ASKED, least=1)
    patience: int = setting(5, "plateau: epochs without improvement before a drop", ASKED, least=0)
    min_lr: float = setting(0.0, "cosine, plateau: lowest learning rate", ASKED, least=0)


@dataclass(frozen=True)
class TrainConfig:
    """The settings of the training loop, such as the number of epochs."""

    epochs: int = setting(30, "passes over the training images", FREE, least=1, experiment=True)
    precision: str = setting("auto", "number format", ASKED, choices=PRECISIONS)
    compile: bool = setting(False, "torch.compile the model", ASKED, experiment=False)
    deterministic: bool = setting(False, "CUDA: deterministic kernels only", ASKED)
    sync_batchnorm: bool = setting(False, "BatchNorm over the whole batch of all GPUs", ASKED)
    clip_grad_norm: float | None = setting(None, "limit of the gradient's norm", ASKED, above=0)
    accumulate: int = setting(1, "batches per optimizer step", FIXED, least=1)
    mixup: float = setting(0.0, "strength of mixup, such as 0.2; 0 none", ASKED, least=0, most=100)
    cutmix: float = setting(0.0, "strength of CutMix, such as 1", ASKED, least=0, most=100)
    ema_decay: float | None = setting(
        None, "average the weights: share kept per step, such as 0.999", ASKED, **SHARE
    )
    early_stop_patience: int | None = setting(
        None, "stop after epochs without a new best", FREE, least=1, experiment=True, scratch=None
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """The settings of the checkpoints.

    An example is the metric that determines the best checkpoint.
    """

    monitor: str = setting("val_acc", "metric that selects best.pth", FIXED, choices=MONITORED)
    every_epochs: int | None = setting(
        None, "keep epoch_005.pth and so on every this many epochs", FREE, least=1, scratch=None
    )
    every_minutes: float | None = setting(5.0, "minutes between saves of last.pth", FREE, above=0)
    every_steps: int | None = setting(None, "steps between saves of last.pth", FREE, least=1)


@dataclass(frozen=True)
class LogConfig:
    """The settings of the progress lines, the HTML report and the TensorBoard files."""

    every_seconds: float = setting(30.0, "seconds between progress lines in a log", FREE, above=0)
    report: bool = setting(True, "report.html and figures; needs matplotlib", FREE, scratch=False)
    tensorboard: bool = setting(False, "logs/tensorboard; needs tensorboard", FREE, scratch=False)
    trackers: list[str] = setting(
        [], "also send epochs there", FREE, scratch=[], choices=TRACKERS, names_code=True
    )
    artifacts: bool = setting(
        False, "send trackers report, settings and best.pth, too", FREE, scratch=False
    )


@dataclass(frozen=True)
class Config:
    """The whole configuration of a run: three top-level keys and the sections."""

    seed: int = setting(0, "seed of everything random", FIXED, least=0, most=2**63 - 1)
    run: str | None = setting(
        None, "name: logs/NAME/, checkpoints/NAME/; {time} is that of the start", FREE, scratch=None
    )
    device: str = setting(
        "auto", "auto, cpu, cuda, cuda:1, mps", FREE, pattern=r"auto|cpu|mps|cuda(:\d+)?"
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    loss: LossConfig = dataclasses.field(default_factory=LossConfig)
    optim: OptimConfig = dataclasses.field(default_factory=OptimConfig)
    schedule: ScheduleConfig = dataclasses.field(default_factory=ScheduleConfig)
    train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)
    log: LogConfig = dataclasses.field(default_factory=LogConfig)


SECTIONS = tuple(f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.type))

# ---------------------------------------------------------------------------------------------
# Values by key, and the metadata of each key


def keys_of(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field]]:
    """Yields the dotted key and the field of each setting in a dataclass.

    Args:
        cls: the dataclass. For the class Config, the keys are "seed", "optim.lr" and so on.
        prefix: text to put before each key, such as "optim.".
    """
    for field in dataclasses.fields(cls):
        if dataclasses.is_dataclass(field.type):
            yield from keys_of(field.type, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field


def resume_rules() -> dict[str, str]:
    """Returns what a resume does with a changed value of each setting.

    A changed value is a value that differs from the checkpoint's value.

    Returns:
        A rule for each dotted key. FREE means that the changed value is taken. ASKED means that the
        changed value is taken only if typed on the command line. FIXED means that the changed value
        is refused.
    """
    return {key: field.metadata["resume"] for key, field in keys_of(Config)}


def non_experiment_keys() -> set[str]:
    """Returns the dotted keys whose values do not change the experiment, such as "device".

    Runs that differ only in the settings with these keys count as the same experiment.
    """
    return {key for key, field in keys_of(Config) if not field.metadata["experiment"]}


def item_fields(kind: Any) -> tuple[dataclasses.Field, ...]:
    """Returns the fields of the dataclass of a list's items.

    For example, the result for `list[GroupConfig]` is the fields of GroupConfig.

    Args:
        kind: the type of a setting. If `kind` is not a list of dataclasses, the result is ().
    """
    items = [item for item in typing.get_args(kind) if dataclasses.is_dataclass(item)]
    return dataclasses.fields(items[0]) if items else ()


def code_keys() -> list[str]:
    """Returns the dotted keys of the settings that may name code of the user.

    Code is named in the form package.module:name. An example of a key is "model.name". Another
    example is "data.augment", whose value is a list that may contain names of code.
    """
    return [
        key
        for key, field in keys_of(Config)
        if any(each.metadata["names_code"] for each in (field, *item_fields(field.type)))
    ]


def import_paths(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Returns the names of the user's code in nested settings.

    A name of code has the form package.module:name. Only the settings that may name code are
    searched, at any depth.

    Args:
        values: nested settings, such as {"model": {"name": "package.module:Net"}}.

    Returns:
        A pair of the dotted key and the name for each name, such as ("model.name",
        "package.module:Net").
    """

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from texts(inner)

    found = flat(values)
    return [
        (key, text) for key in code_keys() for text in texts(found.get(key)) if is_import_path(text)
    ]


def is_import_path(text: str) -> bool:
    """Returns whether a text has the form package.module:name, and is no model of timm."""
    return IMPORT_PATH.fullmatch(text) is not None and not text.startswith("timm:")


def to_dict(cfg: Any) -> dict[str, Any]:
    """Returns a dataclass of settings as nested dicts, such as {"optim": {"lr": 0.05}}.

    The values are numbers, texts, booleans, None, and lists and dicts of such values.

    Args:
        cfg: the dataclass, such as a Config.
    """
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else plain(value)
        for name, value in vars(cfg).items()
    }


def plain(value: Any) -> Any:
    """Returns the value of a setting without dataclasses, in the shortest form.

    A dataclass in a list becomes a dict of the values that differ from their defaults. An example
    is {"name": "resized_crop", "scale": [0.5, 1.0]}. If the dict would contain only the value of
    the first field, and no other field lacks a default, the value replaces the dict. For example,
    "flip" replaces {"name": "flip"}.

    Args:
        value: the value of the setting, such as a list of dataclasses.
    """
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return copy.deepcopy(value)
    fields = dataclasses.fields(value)
    items = {name: plain(item) for name, item in vars(value).items()}
    changed = {f.name: items[f.name] for f in fields if items[f.name] != f.default}
    is_short = list(changed) == [fields[0].name] == required_keys(type(value))
    return changed[fields[0].name] if is_short else changed


def required_keys(cls: type) -> list[str]:
    """Returns the names of the fields of a dataclass that have no default."""
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is MISSING]


def with_values(cfg: Any, **sections: Any) -> Any:
    """Returns a copy of a configuration with some values replaced.

    An example is `with_values(cfg, run="a", train={"epochs": 3})`.

    Args:
        cfg: the configuration, or another dataclass of settings, which stays unchanged.
        sections: the new values by top-level key, and a dict of new values by section. The other
            values of a section stay unchanged.
    """
    changed = {
        name: dataclasses.replace(getattr(cfg, name), **value) if name in SECTIONS else value
        for name, value in sections.items()
    }
    return dataclasses.replace(cfg, **changed)


def for_scratch(cfg: Config, **sections: Any) -> Config:
    """Returns a copy of a configuration for a run that leaves no files behind.

    Such a run is a dry run or a drill. A setting whose metadata give a value `scratch` gets this
    value. The metadata value Ellipsis leaves the setting unchanged.

    Args:
        cfg: the configuration, which stays unchanged.
        sections: further values to replace, such as `train={"epochs": 3}`.
    """
    scratch = {key: field.metadata["scratch"] for key, field in keys_of(Config)}
    changed = nested({key: value for key, value in scratch.items() if value is not ...})
    return with_values(with_values(cfg, **changed), **sections)


def flat(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns nested settings as a dict by dotted key.

    For example, {"optim": {"lr": 1}} becomes {"optim.lr": 1}. A mapping within a section is not
    flattened.

    Args:
        values: the nested settings: top-level values, and a mapping for each section.
    """
    result = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            result |= {f"{key}.{name}": inner for name, inner in value.items()}
        else:
            result[key] = value
    return result


def nested(values: Mapping[str, Any]) -> dict[str, Any]:
    """Returns settings by dotted key as nested settings.

    For example, {"optim.lr": 1} becomes {"optim": {"lr": 1}}.

    Args:
        values: the settings by dotted key.
    """
    result: dict[str, Any] = {}
    for key, value in values.items():
        section, _, name = key.rpartition(".")
        target = result.setdefault(section, {}) if section else result
        target[name] = value
    return result
