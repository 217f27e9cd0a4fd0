"""From the settings to everything that a run is made of, in the order things depend on each other."""

import dataclasses
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from cnn.config import Config, to_dict
from cnn.datasets.augment import DRAWS
from cnn.datasets.build import Data, build_data
from cnn.datasets.loader import Loader, build_loader
from cnn.datasets.preprocessing import Preprocessing
from cnn.errors import Refused
from cnn.metrics.running import EvaluationMetrics
from cnn.metrics.scores import epoch_metrics, mode, result_metrics
from cnn.models import small_maps
from cnn.models.build import build_model
from cnn.training.distributed import ALONE, Group
from cnn.training.engine import set_training
from cnn.training.losses import build_loss, class_weights, has_state
from cnn.training.optim import build_optimizer
from cnn.training.resume import Checkpoint, restore
from cnn.training.schedule import Schedule
from cnn.training.shared_data import build_once_per_node
from cnn.training.state import TrainingState
from cnn.utils import environment as env
from cnn.utils.checkpoint import FORMAT, check_readable, clone_tree
from cnn.utils.module_state import state_preserved


@dataclass(frozen=True)
class Run:
    """A run's parts.

    Attributes:
        metadata: what a checkpoint holds besides the state.
    """

    cfg: Config
    data: Data
    train_loader: Loader
    val_loader: Loader
    test_loader: Loader
    loss: nn.Module
    state: TrainingState
    precision: str
    metadata: dict[str, Any]

    @property
    def steps_per_epoch(self) -> int:
        return _num_steps(self.cfg, self.train_loader)

    @property
    def environment(self) -> dict[str, Any]:
        return self.metadata["environment"]

    def autocast(self) -> torch.autocast:
        """Around a forward pass: the arithmetic's precision."""
        return env.autocast(self.state.device, self.precision)

    def evaluation_metrics(self, *, of_result: bool = False) -> EvaluationMetrics:
        """What an evaluation is to be added to: an epoch's, or the one that is the run's result."""
        number, monitor = len(self.data.classes), self.cfg.checkpoint.monitor
        names = result_metrics(number) if of_result else epoch_metrics(number, monitor)
        return EvaluationMetrics(self.state.device, number, names)


def build_run(
    cfg: Config,
    point: Checkpoint | None = None,
    max_batches: int | None = None,
    group: Group = ALONE,
) -> Run:
    """Builds a run and, given a resume point, puts it there.

    Args:
        max_batches: use only so many batches of every split.
        group: the processes that train together; each builds its own.

    Raises:
        Refused: something cannot be had or does not fit.
    """
    device = env.choose_device(cfg.device, group.launch)
    check_group(cfg, device, group)
    earlier = point.content["environment"]["precision"] if point else None
    precision = env.choose_precision(cfg.train.precision, device, earlier)
    if cfg.train.deterministic:
        env.make_deterministic()
    data = build_once_per_node(group, lambda: build_data(cfg.data, cfg.seed))
    if point is not None:
        saved = point.content["preprocessing"]
        data = data.with_preprocessing(Preprocessing.from_checkpoint(point.path, saved))
    check_monitor(cfg.checkpoint.monitor, data)
    if max_batches is not None:
        data = data.head(max_batches * cfg.data.batch_size)
    # A resume brings its weights along; those that the run began with may be gone.
    begun = replace(cfg.model, weights=None, pretrained=False) if point else cfg.model
    pre = data.preprocessing
    model = build_model(begun, len(data.classes), pre.channels, pre.image_size, cfg.seed)
    model = _prepare_model(model, cfg, device, precision, group)
    loss = build_loss(cfg.loss, data.train.labels, data.classes).to(device)
    loaders = _build_loaders(cfg, data, device, group)
    state = _build_state(cfg, model, loss, _num_steps(cfg, loaders[0]), precision, group)
    if 1 in loaders[0].sizes:
        check_one_image(model, (pre.channels, pre.image_size, pre.image_size))
    metadata = _describe(cfg, data, loss) | {
        "started": point.content["started"] if point else env.timestamp(),
        "environment": env.describe(device, precision, group.size),
    }
    check_readable(clone_tree(state.state_dict()) | metadata)
    if point is not None:
        restore(state, point, data, loaders[0])
    return Run(cfg, data, *loaders, loss, state, precision, metadata)


def _describe(cfg: Config, data: Data, loss: nn.Module) -> dict[str, Any]:
    """What a checkpoint says of the run whatever process goes on with it."""
    return {
        "format": FORMAT,
        "draws": DRAWS,
        "config": to_dict(cfg),
        "classes": data.classes,
        "preprocessing": dataclasses.asdict(data.preprocessing),
        "class_weights": class_weights(loss),
        "data": data.fingerprint(),
    }


def _num_steps(cfg: Config, loader: Loader) -> int:
    """Optimizer steps in an epoch."""
    return -(-len(loader) // cfg.train.accumulate)


def _prepare_model(
    model: nn.Module, cfg: Config, device: torch.device, precision: str, group: Group
) -> nn.Module:
    """The model on its device, with what is quicker or shared there in the place of torch's own."""
    if cfg.train.sync_batchnorm and group.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    on_amx = precision == "bf16" and device.type == "cpu" and env.cpu_has("amx_bf16")
    if on_amx and not cfg.train.compile:
        small_maps.quicken(model)
    return model


def _build_loaders(cfg: Config, data: Data, device: torch.device, group: Group) -> list[Loader]:
    """Of train, val and test; what they decode, one process of a machine does for all there."""
    splits = ((data.train, True), (data.val, False), (data.test, False))
    share = {"rank": group.rank, "num_ranks": group.size}
    common = (data.preprocessing, device, cfg.seed)
    return group.local_rank0_first(
        lambda: [
            build_loader(cfg.data, images, *common, training=training, **share)
            for images, training in splits
        ]
    )


def _build_state(
    cfg: Config, model: nn.Module, loss: nn.Module, steps: int, precision: str, group: Group
) -> TrainingState:
    """The state of a run that has not begun: the model with its optimizer, schedule and scaler."""
    device, optimizer = next(model.parameters()).device, build_optimizer(cfg.optim, model)
    better = mode(cfg.checkpoint.monitor)
    return TrainingState(
        model,
        optimizer,
        Schedule(cfg.schedule, optimizer, steps, cfg.train.epochs, better),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        device,
        ema_decay=cfg.train.ema_decay,
        compile=cfg.train.compile,
        loss=loss if has_state(loss) else None,
        group=group,
    )


def check_group(cfg: Config, device: torch.device, group: Group) -> None:
    """Refuses what several processes cannot do."""
    if group.size == 1:
        return
    if device.type == "mps":
        raise Refused("device: several processes train on CPUs or CUDA devices, not on mps")
    if cfg.data.batch_size < 2 * group.size:
        raise Refused(
            f"data.batch_size: expected at least 2 images for each of {group.size} processes, which"
            f" share every batch; got {cfg.data.batch_size}"
        )
    if cfg.train.sync_batchnorm and device.type != "cuda":
        raise Refused("train.sync_batchnorm: torch's SyncBatchNorm needs CUDA devices; say false")


def check_one_image(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Refuses steps of one image, where a norm would have one value a channel to go by."""
    image = torch.zeros(1, *shape, device=next(model.parameters()).device)
    set_training(model)
    try:
        with torch.no_grad(), state_preserved(model):
            model(image)
    except ValueError as error:  # torch's BatchNorm
        raise Refused(
            f"data.batch_size: the model cannot train on one image at a time ({error}); more images in"
            f" a batch (data.batch_size, data.limit) or a larger data.image_size may help"
        ) from None


def check_monitor(monitor: str, data: Data) -> None:
    """Refuses to look for the best epoch by a metric that these validation images leave undefined."""
    classes, present = data.classes, set(data.val.labels.tolist())
    of_two = {"val_sensitivity": {1}, "val_specificity": {0}}  # and the class that each is metadata
    if monitor in of_two and len(classes) != 2:
        raise Refused(
            f"checkpoint.monitor: {monitor} is for two classes, there are {len(classes)};"
            f" val_balanced_acc is the mean of every class's sensitivity"
        )
    both = {0, 1} if monitor == "val_auc" and len(classes) == 2 else set()
    needed = of_two.get(monitor, both)
    absent = [classes[number] for number in sorted(needed - present)]
    if absent or (monitor == "val_auc" and len(present) < 2):
        raise Refused(
            f"checkpoint.monitor: {monitor} is undefined, since there is no validation image of"
            f" {', '.join(absent) or 'a second class'}; a larger data.val_fraction may help"
        )
