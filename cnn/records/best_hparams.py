"""configs/best_hparams/MODEL_DATA[_TAG].yaml: the best settings so far for a model and data.

With `--config`, the settings are read from such a file, and the results in the file are ignored.
"""

import datetime
import logging
import re
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock

from cnn import config
from cnn.config import Config, with_values
from cnn.config.reader import RECORDS
from cnn.metrics.scores import Metrics, improves
from cnn.utils.files import write_text

logger = logging.getLogger(__name__)

MAX_EARLIER = 10  # the most earlier results that a file keeps
LOCK_SECONDS = 60.0  # to wait for another process, which needs the lock for milliseconds


def file_of(cfg: Config, folder: Path) -> Path:
    """Returns the path of the file with a model's best settings on a dataset.

    The file name consists of the settings model.name, data.name and data.tag. A missing tag is left
    out. Examples are simple_cnn_digits.yaml and simple_cnn_digits_small.yaml. If there is a tag,
    the data names "folder" and "csv" are left out, as in simple_cnn_flowers.yaml.

    Args:
        cfg: the settings of a run.
        folder: the folder of the file, configs/best_hparams.
    """
    source = None if cfg.data.tag and cfg.data.name in ("folder", "csv") else cfg.data.name
    names = filter(None, [cfg.model.name, source, cfg.data.tag])
    words = [re.sub(r"[^\w.\-]+", "-", name) for name in names]
    return folder / f"{'_'.join(words)}.yaml"


def update(
    folder: Path, cfg: Config, best: dict[str, Any], metrics: Metrics, test: Metrics
) -> Path | None:
    """Saves the settings and results of a run that is the best so far.

    Each combination of model and dataset has a file. An existing file is replaced only if the file
    contains a worse value of the same metric.

    Args:
        folder: the folder of the file, configs/best_hparams. A missing folder is created.
        cfg: the settings of the run.
        best: the best epoch of the run, a dict with "metric", "value" and "epoch".
        metrics: the validation metrics of the best epoch.
        test: the metrics of the final test.

    Returns:
        The path of the file, or None if an existing file was kept.

    Raises:
        ValueError: the entry best_metrics of an existing file cannot be read.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(cfg, folder)
    cfg = with_values(cfg, run=None, device="auto")  # these say where it ran, not how
    head = (
        "# yaml-language-server: $schema=../schema.json\n"
        f"# The best of {cfg.model.name} on {cfg.data.name} yet, by {best['metric']}."
        f" Written by train.py, replaced by a better one.\n"
        f"#   python train.py --config configs/best_hparams/{path.name}\n\n"
    )
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
        earlier = _read(path)
        if earlier is not None and not _is_beaten(path, earlier, best, cfg):
            return None
        now = datetime.datetime.now().astimezone().isoformat(timespec="seconds")
        values = {"monitor": best["metric"], "value": best["value"], "epoch": best["epoch"]}
        records = {
            "best_metrics": {**values, "metrics": dict(metrics), "timestamp": now},
            "test_metrics": dict(test),
            "updated_at": now,
            "history": _history(cfg, earlier) if earlier else [],
        }
        dumped = yaml.safe_dump(records, sort_keys=False, allow_unicode=True, width=100)
        write_text(path, f"{head}{config.to_yaml(cfg)}\n{dumped}")
    return path


def _is_beaten(path: Path, earlier: dict[str, Any], best: dict[str, Any], cfg: Config) -> bool:
    """Returns whether the best epoch of a run is better than an earlier result.

    Two different metrics cannot be compared, nor the losses of two loss functions. For these, the
    answer is False, and a message is logged.

    Args:
        path: the path of the file with the earlier result, for the message.
        earlier: the content of the file. Its entry "best_metrics" is a dict with "value" and
            "monitor", the name of the metric.
        best: the best epoch of the run, a dict with "metric", "value" and "epoch".
        cfg: the settings of the run.
    """
    monitor, metric = earlier["best_metrics"]["monitor"], best["metric"]
    is_other_loss = metric == "val_loss" and earlier.get("loss") != config.to_dict(cfg.loss)
    if monitor == metric and not is_other_loss:
        return improves(metric, best["value"], earlier["best_metrics"]["value"])
    other = " of another loss" if monitor == metric else ""
    logger.info(
        f"{path} is kept: it is the best by {monitor}{other}, this run looked for {metric};"
        f" data.tag=WORD gives this one a file of its own"
    )
    return False


def best_result(path: Path) -> tuple[str, float] | None:
    """Reads the best result from a file in configs/best_hparams.

    Args:
        path: the path of the file.

    Returns:
        The name of the metric and its value, such as ("val_acc", 0.98). None if the file is missing
        or cannot be read.
    """
    try:
        best = _read(path)["best_metrics"]
    except (OSError, ValueError, TypeError):
        return None
    return best["monitor"], best["value"]


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the content of a file in configs/best_hparams.

    Returns:
        The entries of the file by name. None if the file does not exist.

    Raises:
        ValueError: the file is not YAML, or the entry best_metrics is missing or wrong.
    """
    if not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        best = content["best_metrics"]
        best["monitor"], best["value"] = str(best["monitor"]), float(best["value"])
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: expected best_metrics of an earlier run, got {error!r}; left as it is"
        ) from None
    return content


def _history(cfg: Config, earlier: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the list of earlier best results for the new version of a file.

    Args:
        cfg: the settings that are now the best.
        earlier: the content of the old version of the file.

    Returns:
        At most 10 entries, the latest first. The first entry has the best result in `earlier`, and
        the settings in `earlier` that differ from `cfg`. The list of earlier results in `earlier`
        follows.
    """
    best, now = earlier["best_metrics"], config.flat(config.to_dict(cfg))
    settings = config.flat({key: v for key, v in earlier.items() if key not in RECORDS})
    entry = {
        **{key: best.get(key) for key in ("monitor", "value", "epoch", "timestamp")},
        "test_acc": (earlier.get("test_metrics") or {}).get("test_acc"),
        "settings": {key: v for key, v in settings.items() if key in now and now[key] != v},
    }
    return [entry, *(earlier.get("history") or [])][:MAX_EARLIER]
