"""configs/best_hparams/MODEL_DATA[_TAG].yaml: the best settings yet for a model and data.

`--config` takes such a file again and skips the results that it records.
"""

import logging
import re
import time
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

MAX_EARLIER = 10  # earlier bests that a file keeps
LOCK_SECONDS = 60.0  # to wait for another process, which holds the lock for milliseconds


def file_of(cfg: Config, folder: Path) -> Path:
    """Returns the file for the model and data of these settings.

    All folders and tables are called alike: there the tag takes the place of the data's name.
    """
    names = [cfg.model.name, cfg.data.name, cfg.data.tag or ""]
    if cfg.data.tag and cfg.data.name in ("folder", "csv"):
        names.remove(cfg.data.name)
    words = [re.sub(r"[^\w.\-]+", "-", name) for name in names if name]
    return folder / f"{'_'.join(words)}.yaml"


def update(
    folder: Path, cfg: Config, best: dict[str, Any], metrics: Metrics, test: Metrics
) -> Path | None:
    """Replaces the file if this result is better than the one it holds, by the same metric.

    Args:
        best: {"metric", "value", "epoch"} of the run's best epoch.
        metrics: the validation metrics of that epoch.
        test: the metrics of the final test.

    Returns:
        The file, or None where it stays as it is.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(cfg, folder)
    cfg = with_values(cfg, run=None, device="auto")  # where it ran, not how
    head = (
        "# yaml-language-server: $schema=../schema.json\n"
        f"# The best of {cfg.model.name} on {cfg.data.name} yet, by {best['metric']}."
        f" Written by train.py, replaced by a better one.\n"
        f"#   python train.py --config configs/best_hparams/{path.name}\n\n"
    )
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
        earlier = _read(path)
        if earlier is not None and not _is_beaten(path, earlier["best_metrics"], best):
            return None
        now = time.strftime("%Y-%m-%d %H:%M:%S")
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


def _is_beaten(path: Path, earlier: dict[str, Any], best: dict[str, Any]) -> bool:
    """Returns whether `best` is better by the same metric; logs that metrics differ."""
    monitor, metric = earlier["monitor"], best["metric"]
    if monitor == metric:
        return improves(metric, best["value"], earlier["value"])
    logger.info(
        f"{path} is kept: it is the best by {monitor}, this run looked for {metric}; data.tag=WORD"
        f" gives this one a file of its own"
    )
    return False


def best_result(path: Path) -> tuple[str, float] | None:
    """Reads the metric and its value from a file; None where there is no such file."""
    try:
        best = _read(path)["best_metrics"]
    except (OSError, ValueError, TypeError):
        return None
    return best["monitor"], best["value"]


def _read(path: Path) -> dict[str, Any] | None:
    """Returns the content of a file, or None where there is none.

    Raises:
        ValueError: the file holds no best_metrics, since someone has changed it.
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
    """Returns the earlier bests, latest first, each with its settings that differ from `cfg`."""
    best, now = earlier["best_metrics"], config.flat(config.to_dict(cfg))
    settings = config.flat({key: v for key, v in earlier.items() if key not in RECORDS})
    entry = {
        **{key: best.get(key) for key in ("monitor", "value", "epoch", "timestamp")},
        "test_acc": (earlier.get("test_metrics") or {}).get("test_acc"),
        "settings": {key: v for key, v in settings.items() if key in now and now[key] != v},
    }
    return [entry, *(earlier.get("history") or [])][:MAX_EARLIER]
