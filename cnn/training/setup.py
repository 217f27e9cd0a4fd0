"""Builds all parts of a run from the settings, in the order in which they need each other."""

import dataclasses
from typing import Any

import numpy as np
import torch
from torch import nn

from cnn.config import Config, to_dict
from cnn.datasets.augment import DRAWS, build_step
from cnn.datasets.build import Data, as_trained, build_data
from cnn.datasets.decode import silence_pillow
from cnn.datasets.loader import Loader, build_loader
from cnn.datasets.preprocessing import Preprocessing
from cnn.errors import Refused
from cnn.metrics.running import EvaluationMetrics
from cnn.metrics.scores import OF_TWO_CLASSES, mode
from cnn.models import depthwise, small_maps
from cnn.models.build import build_model
from cnn.training.distributed import ALONE, Group
from cnn.training.engine import set_training_mode
from cnn.training.losses import build_loss, class_weights, has_state
from cnn.training.optim import build_optimizer
from cnn.training.resume import Checkpoint, restore
from cnn.training.run import Run
from cnn.training.schedule import Schedule
from cnn.training.state import TrainingState
from cnn.utils import environment as env
from cnn.utils.checkpoint import FORMAT, check_readable, clone_tree
from cnn.utils.module_state import state_preserved
from cnn.utils.run_folder import RunFolder


def build_run(
    cfg: Config,
    folder: RunFolder | None = None,
    group: Group = ALONE,
    checkpoint: Checkpoint | None = None,
    max_batches: int | None = None,
    trace: Any = None,
) -> Run:
    """Builds all parts of a run.

    Args:
        cfg: the settings.
        folder: the folder to which the run writes. If None, the folder of the run `cfg.run`.
        group: the processes that train together. Every process has to call this function.
        checkpoint: the checkpoint from which the run resumes. None for a new run.
        max_batches: the largest number of batches per split. None means no limit.
        trace: an object that records every batch for `train.py --drill`. None in other runs.

    Raises:
        Refused: a file is missing, or the settings do not fit data, hardware or checkpoint.
    """
    device = env.choose_device(cfg.device, group.launch)
    check_group(cfg, device, group)
    earlier = checkpoint.content["environment"]["precision"] if checkpoint else None
    precision = env.choose_precision(cfg.train.precision, device, earlier)
    if cfg.train.deterministic:
        env.make_deterministic()
    data = _build_data(cfg, group, checkpoint)
    check_monitor(cfg.checkpoint.monitor, data)
    if max_batches is not None:
        data = data.head(max_batches * cfg.data.batch_size)
    model, new = _build_model(cfg, data, device, precision, group, checkpoint)
    loss = build_loss(cfg.loss, data.train.labels, data.classes, device)
    loaders = _build_loaders(cfg, data, device, group)
    state = _build_state(cfg, model, new, loss, len(loaders[0]), precision)
    train_model = group.wrap(torch.compile(model) if cfg.train.compile else model)
    if 1 in loaders[0].sizes:
        check_one_image(model, data.preprocessing.shape)
    started = checkpoint.content["started"] if checkpoint else env.timestamp()
    metadata = _metadata(cfg, data, loss, started, env.describe(device, precision, group.size))
    metadata["new_parameters"] = new
    check_readable(clone_tree(state.state_dict()) | metadata)
    if checkpoint is not None:
        restore(state, checkpoint, data, loaders[0])
        metadata["data"] = checkpoint.content["data"]  # one of an earlier version stays one
    folder = folder or RunFolder(cfg.run)
    return Run(
        cfg, folder, group, data, *loaders, loss, state, train_model, precision, metadata, trace
    )


def _build_data(cfg: Config, group: Group, checkpoint: Checkpoint | None) -> Data:
    """Reads the data of a run. A run that resumes keeps the preprocessing of the checkpoint.

    One process of each machine reads the files first. The others find what was learnt of the files,
    and the decoded pictures, in the cache.
    """
    wanted, saved = cfg.data, None
    if checkpoint is not None:
        content = checkpoint.content
        saved = Preprocessing.from_checkpoint(checkpoint.path, content["preprocessing"])
        wanted = as_trained(cfg.data, content["data"], saved)
    silence_pillow()
    for change in cfg.data.augment:  # a mistake is told before the files are read
        build_step(change)
    with group.local_rank0_first():
        return build_data(wanted, cfg.seed, saved)


def _metadata(
    cfg: Config, data: Data, loss: nn.Module, started: str, environment: dict[str, Any]
) -> dict[str, Any]:
    return {
        "format": FORMAT,
        "draws": DRAWS,
        "config": to_dict(cfg),
        "classes": data.classes,
        "preprocessing": dataclasses.asdict(data.preprocessing),
        "class_weights": class_weights(loss),
        "data": data.fingerprint(),
        "started": started,
        "environment": environment,
    }


def _build_model(
    cfg: Config,
    data: Data,
    device: torch.device,
    precision: str,
    group: Group,
    checkpoint: Checkpoint | None,
) -> tuple[nn.Module, list[str]]:
    """Builds the model on the device of this process.

    With several processes, the setting `train.sync_batchnorm` replaces BatchNorm by SyncBatchNorm.
    On a CPU with AMX, some layers of an uncompiled bf16 model are replaced by faster layers.

    Args:
        cfg: the settings.
        data: the data, which determine the number of classes and the shape of the images.
        device: the device of this process.
        precision: the precision of a forward pass: "fp32", "bf16" or "fp16".
        group: the processes that train together.
        checkpoint: the checkpoint from which the run resumes, which replaces all weights. Initial
            weights are read only for a new run.

    Returns:
        The model, and the names of the parameters that are new, if the others came from weights.
    """
    wanted = cfg.model
    if checkpoint is not None:
        wanted = dataclasses.replace(cfg.model, weights=None, pretrained=False)
    pre = data.preprocessing
    model, new = build_model(wanted, data.classes, pre.channels, pre.image_size, cfg.seed)
    if checkpoint is not None:
        new = checkpoint.content.get("new_parameters", [])  # older files lack it
    if cfg.train.sync_batchnorm and group.size > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model = model.to(device, memory_format=torch.channels_last)
    on_amx = precision == "bf16" and device.type == "cpu" and env.cpu_has("amx_bf16")
    if on_amx and not cfg.train.compile:
        small_maps.use_small_maps(model)
        depthwise.use_depthwise(model)
    return model, new


def _build_loaders(cfg: Config, data: Data, device: torch.device, group: Group) -> list[Loader]:
    """Builds the loaders of the training, validation and test images, in this order.

    On each machine, one process decodes the images into a cache. The other processes of the machine
    wait, and then read the cache.
    """
    common = (data.preprocessing, device, cfg.seed)
    share = {"rank": group.rank, "num_ranks": group.size}
    with group.local_rank0_first():
        return [
            build_loader(cfg.data, images, *common, training=images is data.train, **share)
            for images in (data.train, data.val, data.test)
        ]


def _build_state(
    cfg: Config, model: nn.Module, new: list[str], loss: nn.Module, num_batches: int, precision: str
) -> TrainingState:
    device, optimizer = next(model.parameters()).device, build_optimizer(cfg.optim, model, new)
    steps, better = -(-num_batches // cfg.train.accumulate), mode(cfg.checkpoint.monitor)
    return TrainingState(
        model,
        optimizer,
        Schedule(cfg.schedule, optimizer, steps, cfg.train.epochs, better),
        torch.amp.GradScaler(device.type, enabled=precision == "fp16"),
        device,
        ema_decay=cfg.train.ema_decay,
        loss=loss if has_state(loss) else None,
    )


def check_group(cfg: Config, device: torch.device, group: Group) -> None:
    """Raises Refused if the run cannot train in several processes.

    Several processes need CPUs or CUDA devices. A batch needs at least two images per process. The
    setting `train.sync_batchnorm` needs CUDA devices.

    Args:
        cfg: the settings.
        device: the device of this process.
        group: the processes that train together. A single process is always permitted.
    """
    if group.size == 1:
        return
    if device.type == "mps":
        raise Refused("device: expected CPUs or CUDA devices for several processes, got mps")
    if cfg.data.batch_size < 2 * group.size:
        expected = f"at least 2 images for each of {group.size} processes, which share every batch"
        raise Refused(f"data.batch_size: expected {expected}; got {cfg.data.batch_size}")
    if cfg.train.sync_batchnorm and device.type != "cuda":
        raise Refused("train.sync_batchnorm: torch's SyncBatchNorm needs CUDA devices; say false")


def check_one_image(model: nn.Module, shape: tuple[int, ...]) -> None:
    """Raises Refused if the model cannot train on a batch of one image.

    For example, BatchNorm needs more than one value per channel.

    Args:
        model: the model, which is put into training mode. The state dict does not change.
        shape: the shape of an image, (channels, height, width).
    """
    image = torch.zeros(1, *shape, device=next(model.parameters()).device)
    set_training_mode(model)
    try:
        with torch.no_grad(), state_preserved(model):
            model(image)
    except ValueError as error:  # raised by torch's BatchNorm
        reason = f"the model cannot train on one image at a time ({error})"
        advice = "more images per batch (data.limit) or a larger data.image_size may help"
        raise Refused(f"data.batch_size: {reason}; {advice}") from None


def check_monitor(monitor: str, data: Data) -> None:
    """Raises Refused if the validation images do not define the monitored metric.

    For example, AUC is undefined if all validation images have the same class.

    Args:
        monitor: the metric by which the best epoch is chosen, such as "val_auc".
        data: the data, with the labels of the validation images and the names of the classes.
    """
    number, name = len(data.classes), monitor.removeprefix("val_")
    present = torch.from_numpy(np.unique(data.val.labels))
    metrics = EvaluationMetrics(torch.device("cpu"), number, [name])
    metrics.add(torch.zeros(()), nn.functional.one_hot(present, number).float(), present)
    if metrics.compute()[name] is None:
        reason = f"is for two classes, there are {number}; val_balanced_acc averages sensitivities"
        if number == 2 or name not in OF_TWO_CLASSES:
            absent = ", ".join(c for i, c in enumerate(data.classes) if i not in present)
            reason = f"is undefined without validation images of {absent}; see data.val_fraction"
        raise Refused(f"checkpoint.monitor: {monitor} {reason}")
