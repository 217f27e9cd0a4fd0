"""The settings of a run: frozen dataclasses, mirrored by a strictly checked YAML file.

Every key stands here once, with its type, default, limits, meaning, and what a resume, a comparison
and a scratch run make of it. Nothing here imports torch, so that a typo is answered at once.
"""

import copy
import dataclasses
import re
import typing
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass
from typing import Any

# What a resume makes of a key that differs from the checkpoint's.
FREE = "taken"  # may change: paths, workers, epochs
ASKED = "taken only when typed on the command line"  # changes the mathematics: lr, loss
FIXED = "cannot change"  # what the weights or the order of the images rest on

IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

# What `setting` may say of a key besides, and what holds where it does not.
UNSAID: dict[str, Any] = {
    "experiment": None,  # whether another value makes another experiment; None: unless it is FREE
    "scratch": ...,  # the value in a run of which nothing is to stay, --dry-run; ...: the run's own
    "names_code": False,  # whether package.module:name is taken too
    "choices": (),
    "pattern": None,  # regular expression for the whole text
    **dict.fromkeys(("least", "above", "most", "below")),  # limits of a number
}


def setting(default: Any, description: str, resume: str, **more: Any) -> Any:
    """Makes a dataclass field that knows what its setting means.

    Args:
        default: MISSING where it has to be given.
        description: its meaning, for --print-config and editors.
        resume: FREE, ASKED or FIXED.
        more: of UNSAID.
    """
    assert more.keys() <= UNSAID.keys(), f"{description}: expected {list(UNSAID)}, got {list(more)}"
    metadata = UNSAID | {"description": description, "resume": resume} | more
    if metadata["experiment"] is None:
        metadata["experiment"] = resume != FREE
    if isinstance(default, (list, dict)):
        return dataclasses.field(default_factory=lambda: type(default)(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


# ---------------------------------------------------------------------------------------------
# The keys. What a choice stands for is in a table of its room; a test holds both together.

KNOWN_DATASETS = ("mnist", "fashion_mnist", "kmnist", "cifar10", "cifar100", "svhn")
DATA_NAMES = ("digits", "synthetic", *KNOWN_DATASETS, "folder", "csv")
AUGMENTATIONS = ("crop", "flip", "rotate", "color", "resized_crop", "erase")
MODEL_NAMES = ("simple_cnn", "lenet5", "resnet9", "resnet20")  # beside torchvision's
OPTIMIZERS = ("sgd", "adam", "adamw", "nadam", "radam", "rmsprop", "adagrad", "adamax")
LOSSES = ("cross_entropy",)
SCHEDULES = ("constant", "step", "multistep", "cosine", "onecycle", "plateau")
# Of the validation; f1 is the mean over the classes, and so is auc, but of two classes class 1's.
MONITORED = (
    *("val_acc", "val_loss", "val_balanced_acc", "val_f1", "val_auc", "val_log_loss", "val_ece"),
    *("val_sensitivity", "val_specificity"),  # of two classes; class 1 is the positive one
)


@dataclass(frozen=True)
class AugmentationConfig:
    """A random change to training images; where it is a name alone, that is all to be written."""

    name: str = setting(MISSING, "which change", ASKED, choices=AUGMENTATIONS, names_code=True)
    scale: list[float] | None = setting(
        None, "resized_crop: least and largest share of the area", ASKED, above=0, most=1
    )


@dataclass(frozen=True)
class DataConfig:
    name: str = setting("digits", "what to train on", FIXED, choices=DATA_NAMES, names_code=True)
    root: str = setting("data", "where the files are; for csv, the file", FREE, experiment=True)
    download: bool = setting(False, "fetch missing files of a known set", FREE)
    args: dict[str, Any] = setting({}, "further keywords for synthetic or your own", FIXED)
    batch_size: int = setting(64, "images a batch, over all processes", FIXED, least=1)
    num_workers: int = setting(0, "loader processes, 0 for none", FREE, least=0, most=1024)
    val_fraction: float = setting(
        0.1, "share of train held out where there is no val", FIXED, above=0, below=1
    )
    test_fraction: float = setting(
        0.2, "share held out where there is no test", FIXED, above=0, below=1
    )
    limit: int | None = setting(None, "use only that many training images", FIXED, least=1)
    sampler: str = setting(
        "shuffle",
        "every image once an epoch, or as many drawn with each class equally often",
        FIXED,
        choices=("shuffle", "balanced"),
    )
    image_size: int | None = setting(
        None, "side in pixels to resize and crop to; null: the data's own", FIXED, least=1
    )
    channels: int | None = setting(
        None, "1 gray, 3 colour; null: the data's own", FIXED, least=1, most=3
    )
    augment: list[AugmentationConfig] = setting([], "random changes to training images", ASKED)
    in_memory: bool | str = setting(
        "auto", "keep decoded images in memory: auto where they fit", FIXED, choices=("auto",)
    )
    on_bad_image: str = setting(
        "stop", "when a file does not decode", FIXED, choices=("stop", "skip")
    )
    tag: str | None = setting(
        None, "a word for what the data is, for file names", FREE, experiment=True
    )


@dataclass(frozen=True)
class ModelConfig:
    name: str = setting(
        "simple_cnn",
        f"{', '.join(MODEL_NAMES)}, a torchvision model, or package.module:Class",
        FIXED,
        names_code=True,
    )
    args: dict[str, Any] = setting({}, "further keywords for the model", FIXED)
    pretrained: bool = setting(
        False, "begin from torchvision's weights (downloads them)", FREE, experiment=True
    )
    weights: str | None = setting(
        None, "file with weights to begin from, instead of a download", FREE, experiment=True
    )


@dataclass(frozen=True)
class LossConfig:
    name: str = setting(
        "cross_entropy", "what is minimised", ASKED, choices=LOSSES, names_code=True
    )
    label_smoothing: float = setting(
        0.0, "share of the target spread over all classes", ASKED, least=0, below=1
    )
    class_weights: str | list[float] | None = setting(
        None,
        "balanced (by training counts), or a number a class",
        ASKED,
        choices=("balanced",),
        above=0,
    )
    args: dict[str, Any] = setting({}, "further keywords for your own loss", ASKED)


@dataclass(frozen=True)
class GroupConfig:
    """Parameters whose name matches, with a learning rate of their own."""

    match: str = setting(MISSING, "regular expression", ASKED)
    lr_scale: float = setting(MISSING, "factor on optim.lr; 0 freezes", ASKED, least=0)


@dataclass(frozen=True)
class OptimConfig:
    name: str = setting(
        "sgd", "an optimizer of torch.optim", FIXED, choices=OPTIMIZERS, names_code=True
    )
    lr: float = setting(0.05, "learning rate at its highest", ASKED, above=0)
    momentum: float = setting(0.9, "of sgd and rmsprop", ASKED, least=0, below=1)
    weight_decay: float = setting(5e-4, "on weights; biases and norms have none", ASKED, least=0)
    groups: list[GroupConfig] = setting([], "own lr by parameter name", FIXED)
    freeze: str | None = setting(
        None, "regular expression: parameters that stay as they are at first", FIXED
    )
    freeze_epochs: int = setting(0, "for that many epochs", ASKED, least=0)
    args: dict[str, Any] = setting({}, "further keywords for the optimizer", ASKED)


@dataclass(frozen=True)
class ScheduleConfig:
    name: str = setting("cosine", "how lr changes", FIXED, choices=SCHEDULES)
    warmup_epochs: float = setting(
        0.0, "linear rise from 0 first, by the step; not for onecycle", ASKED, least=0, most=10**6
    )
    gamma: float = setting(0.1, "factor of step, multistep and plateau", ASKED, above=0, below=1)
    step_epochs: int = setting(30, "step: epochs between two drops", ASKED, least=1)
    milestones: list[int] = setting([], "multistep: epochs of the drops", ASKED, least=1)
    patience: int = setting(5, "plateau: epochs without improvement before a drop", ASKED, least=0)
    min_lr: float = setting(0.0, "cosine, plateau: never below", ASKED, least=0)


@dataclass(frozen=True)
class TrainConfig:
    epochs: int = setting(30, "passes over the training images", FREE, least=1, experiment=True)
    precision: str = setting(
        "auto", "of the arithmetic", ASKED, choices=("auto", "fp32", "bf16", "fp16")
    )
    compile: bool = setting(False, "torch.compile the model", ASKED, experiment=False)
    deterministic: bool = setting(False, "CUDA: repeatable kernels only", ASKED)
    sync_batchnorm: bool = setting(
        False, "several GPUs: BatchNorm over the whole batch, not each one's share", ASKED
    )
    clip_grad_norm: float | None = setting(None, "largest norm of the gradient", ASKED, above=0)
    accumulate: int = setting(1, "batches an optimizer step", FIXED, least=1)
    ema_decay: float | None = setting(
        None, "average the weights: share kept a step, 0.999 say", ASKED, above=0, below=1
    )
    early_stop_patience: int | None = setting(
        None, "epochs without improvement, then stop", FREE, least=1, experiment=True, scratch=None
    )


@dataclass(frozen=True)
class CheckpointConfig:
    monitor: str = setting("val_acc", "what best.pth is best in", FIXED, choices=MONITORED)
    every_epochs: int | None = setting(
        None, "keep epoch_005.pth and so on every so many epochs", FREE, least=1, scratch=None
    )
    every_minutes: float | None = setting(
        5.0, "save last.pth within an epoch that often", FREE, above=0
    )
    every_steps: int | None = setting(
        None, "save last.pth within an epoch every so many steps", FREE, least=1
    )


@dataclass(frozen=True)
class LogConfig:
    """What is written says for each key what it is in a scratch run, which leaves nothing."""

    every_seconds: float = setting(
        30.0, "off a terminal, a line that often within an epoch", FREE, above=0
    )
    report: bool = setting(
        True, "logs/report.html and figures; needs matplotlib", FREE, scratch=False
    )
    tensorboard: bool = setting(
        False, "event files in logs/tensorboard; needs tensorboard", FREE, scratch=False
    )


@dataclass(frozen=True)
class Config:
    seed: int = setting(0, "the run is a function of it", FIXED, least=0, most=2**63 - 1)
    run: str | None = setting(None, "name: logs/NAME/ and checkpoints/NAME/", FREE, scratch=None)
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


SECTIONS = tuple(
    name for name, kind in typing.get_type_hints(Config).items() if dataclasses.is_dataclass(kind)
)

# ---------------------------------------------------------------------------------------------
# Values by key, and what is known of each


def keys_of(cls: type, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field, Any]]:
    """Lists the keys below a dataclass: `section.key`, the field that knows its meaning, its type."""
    hints = typing.get_type_hints(cls)
    for field in dataclasses.fields(cls):
        kind = hints[field.name]
        if dataclasses.is_dataclass(kind):
            yield from keys_of(kind, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name, field, kind


def resume_rules() -> dict[str, str]:
    """For each dotted key, what a resume makes of a change: FREE, ASKED or FIXED."""
    return {key: field.metadata["resume"] for key, field, _ in keys_of(Config)}


def non_experiment_keys() -> set[str]:
    """The keys that do not make it another experiment: where it ran and what it wrote beside."""
    return {key for key, field, _ in keys_of(Config) if not field.metadata["experiment"]}


def code_keys() -> list[str]:
    """The keys that may name code of the user's own, themselves or in the mappings of a list."""

    def names_code(field: dataclasses.Field, kind: Any) -> bool:
        inner = [item for item in typing.get_args(kind) if dataclasses.is_dataclass(item)]
        return field.metadata["names_code"] or any(
            names_code(below, below_kind)
            for item in inner
            for _, below, below_kind in keys_of(item)
        )

    return [key for key, field, kind in keys_of(Config) if names_code(field, kind)]


def import_paths(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The code that nested settings name, however deep in a list: key and package.module:name."""

    def texts(value: Any) -> Iterator[str]:
        if isinstance(value, str):
            yield value
        elif isinstance(value, (list, tuple, dict)):
            for inner in value.values() if isinstance(value, dict) else value:
                yield from texts(inner)

    given = flat(values)
    return [
        (key, text) for key in code_keys() for text in texts(given.get(key)) if is_import_path(text)
    ]


def is_import_path(text: str) -> bool:
    """Whether the text reads package.module:name."""
    return IMPORT_PATH.fullmatch(text) is not None


def to_dict(cfg: Any) -> dict[str, Any]:
    """The configuration as plain nested values, as the YAML file would give them."""
    values = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    return {
        name: to_dict(value) if dataclasses.is_dataclass(value) else plain(value)
        for name, value in values.items()
    }


def plain(value: Any) -> Any:
    """A setting's value without dataclasses: of a mapping in a list, what is not its default.

    Where that is its first key alone, and the others may be left out, the value of that.
    """
    if isinstance(value, list):
        return [plain(item) for item in value]
    if not dataclasses.is_dataclass(value):
        return copy.deepcopy(value)
    fields = dataclasses.fields(value)
    given = {f.name: plain(getattr(value, f.name)) for f in fields}
    given = {f.name: given[f.name] for f in fields if given[f.name] != f.default}
    is_short = list(given) == [fields[0].name] == required_keys(type(value))
    return given[fields[0].name] if is_short else given


def required_keys(cls: type) -> list[str]:
    """The keys of a mapping in a list that have to be there."""
    return [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is MISSING]


def with_values(cfg: Config, **sections: Any) -> Config:
    """The configuration with some values replaced: `with_values(cfg, run="a", train={"epochs": 3})`."""
    changed = {
        name: dataclasses.replace(getattr(cfg, name), **value) if name in SECTIONS else value
        for name, value in sections.items()
    }
    return dataclasses.replace(cfg, **changed)


def for_scratch(cfg: Config, **sections: Any) -> Config:
    """The configuration of a run of which nothing is to stay, with some values replaced besides."""
    for key, field, _ in keys_of(Config):
        section, _, name = key.rpartition(".")
        value = field.metadata["scratch"]
        if value is not ...:
            cfg = with_values(cfg, **({section: {name: value}} if section else {name: value}))
    return with_values(cfg, **sections)


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"optim": {"lr": 1}}` as `{"optim.lr": 1}`; what stands below section.key is one value."""
    result = {}
    for key, value in values.items():
        if isinstance(value, Mapping) and not prefix:
            result |= flat(value, f"{key}.")
        else:
            result[prefix + key] = value
    return result
