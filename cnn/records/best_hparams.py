"""configs/best_hparams/MODEL_DATA[_TAG].yaml: the best settings yet for a model and data.

`--config` takes such a file again: it reads past what is said there of the result.
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

MAX_EARLIER = 10  # earlier bests that are kept
LOCK_SECONDS = 60.0  # to wait for another process, which holds it for milliseconds


def file_of(cfg: Config, folder: Path) -> Path:
    """The file for the model and data of these settings; a tag stands for a folder's or a CSV's."""
    data = [] if cfg.data.tag and cfg.data.name in ("folder", "csv") else [cfg.data.name]
    words = [cfg.model.name, *data, *([cfg.data.tag] if cfg.data.tag else [])]
    return folder / ("_".join(re.sub(r"[^\w.\-]+", "-", word) for word in words) + ".yaml")


def update(
    folder: Path, cfg: Config, best: dict[str, Any], metrics: Metrics, test: Metrics
) -> Path | None:
    """Replaces the file if this result is better than the one it holds, by the same metric.

    Args:
        best: {"metric", "value", "epoch"} of the run's best epoch.
        metrics: that epoch's, of the validation.
        test: of the final test.

    Returns:
        The file, or None where it keeps what it has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = file_of(cfg, folder)
    # The device and the run's name say where it was, not how.
    cfg = with_values(cfg, run=None, device="auto")
    with FileLock(path.with_name(f".{path.name}.lock"), timeout=LOCK_SECONDS):
        earlier = _read(path)
        if earlier is not None:
            held = earlier["best_metrics"]
            if held["monitor"] != best["metric"]:
                logger.info(
                    "%s is kept: it is the best by %s, this run looked for %s; with data.tag=WORD"
                    " this one has a file of its own",
                    *(path, held["monitor"], best["metric"]),
                )
                return None
            if not improves(best["metric"], best["value"], held["value"]):
                return None
        write_text(path, _text(cfg, best, metrics, test, earlier))
    return path


def held_in(path: Path) -> tuple[str, float] | None:
    """The metric and its value that the file holds; None where it holds none."""
    try:
        content = _read(path)
    except (OSError, ValueError):
        return None
    held = content and content["best_metrics"]
    return (held["monitor"], float(held["value"])) if held else None


def _read(path: Path) -> dict[str, Any] | None:
    """What the file holds; None where there is none.

    Raises:
        ValueError: it is not such a file; the user may have made something of it.
    """
    if not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
        float(content["best_metrics"]["value"]), content["best_metrics"]["monitor"]
    except (yaml.YAMLError, KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: left as it is: expected the best_metrics of an earlier run in it ({error!r})"
        ) from None
    return content


def _text(
    cfg: Config,
    best: dict[str, Any],
    metrics: Metrics,
    test: Metrics,
    earlier: dict[str, Any] | None,
) -> str:
    now = time.strftime("%Y-%m-%d %H:%M:%S")
    records = {
        "best_metrics": {
            "monitor": best["metric"],
            "value": best["value"],
            "epoch": best["epoch"],
            "metrics": dict(metrics),
            "timestamp": now,
        },
        "test_metrics": dict(test),
        "updated_at": now,
        "history": _history(cfg, earlier),
    }
    head = (
        "# yaml-language-server: $schema=../schema.json\n"
        f"# The best of {cfg.model.name} on {cfg.data.name} yet, by {best['metric']}."
        f" Written by train.py, replaced by a better one.\n"
        f"#   python train.py --config configs/best_hparams/{file_of(cfg, Path()).name}\n\n"
    )
    dumped = yaml.safe_dump(records, sort_keys=False, allow_unicode=True, width=100)
    return head + config.to_yaml(cfg) + "\n" + dumped


def _history(cfg: Config, earlier: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Earlier bests, the latest first: result, and the settings that were others than today's."""
    if earlier is None:
        return []
    held, now = earlier["best_metrics"], config.flat(config.to_dict(cfg))
    settings = {key: value for key, value in earlier.items() if key not in RECORDS}
    entry = {
        **{key: held.get(key) for key in ("monitor", "value", "epoch", "timestamp")},
        "test_acc": (earlier.get("test_metrics") or {}).get("test_acc"),
        "settings": {
            key: value
            for key, value in config.flat(settings).items()
            if key in now and now[key] != value
        },
    }
    return [entry, *(earlier.get("history") or [])][:MAX_EARLIER]
