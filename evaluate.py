"""Measures a trained model: on the data it was trained for, or on other data with its classes.

Commands:

    python evaluate.py                                  the best epoch, on its test images
    python evaluate.py --split val                      ... on those that it was chosen by
    python evaluate.py --checkpoint checkpoints/a/best.pth
    python evaluate.py data.root=photos2                on other images with the same classes
    python evaluate.py --json result.json --figure confusion.png

Settings come from the checkpoint. Nothing is written but what is asked for.
"""

import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn import cli
from cnn.errors import Refused
from cnn.utils.files import write_output
from cnn.utils.screen import write_stdout

if TYPE_CHECKING:
    import numpy as np

    from cnn.inference.evaluation import EvaluationData
    from cnn.inference.trained_model import TrainedModel
    from cnn.metrics.scores import Metrics
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger("cnn.evaluate")

# Where the images are and how they are read; nothing of what the model is.
SETTINGS = (
    *("device", "data.name", "data.root", "data.args", "data.download", "data.batch_size"),
    *("data.num_workers", "data.in_memory", "data.on_bad_image", "train.precision"),
    "log.every_seconds",
)
MAX_ROWS = 40  # classes on the screen
MAX_PAIRS = 5  # of classes mixed up


class Command(cli.Command):
    split: str
    json: Path | None
    figure: Path | None


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv)


def prepare(argv: list[str]) -> cli.Task:
    command = parse(argv)
    return cli.Task(
        lambda log, stop: evaluate_checkpoint(command, log, stop),
        command.places,
        "cnn.inference.evaluation",
    )


def parse(argv: list[str]) -> Command:
    """Reads the command line, and looks whether what it names is there.

    Raises:
        Refused: a setting or a file that cannot be.
    """
    parser = cli.checkpoint_parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("--split", choices=("val", "test"), default="test", help="which images (default test)")
    add("--json", type=Path, metavar="FILE", help="write every figure, with all digits")
    add("--figure", type=Path, metavar="FILE", help="draw the confusion matrix (.png)")
    add("settings", nargs="*", metavar="key=value", help=f"{', '.join(SETTINGS)}")
    command = parser.parse_intermixed_args(argv, Command())
    cli.check_settings(command.settings, SETTINGS)
    if command.figure and command.figure.suffix.lower() != ".png":
        parser.error(f"--figure: expected a name that ends with .png, got {command.figure}")
    for option, file in (("--json", command.json), ("--figure", command.figure)):
        if file is not None:
            cli.check_output(option, file)
    cli.check_checkpoint(command.checkpoint)
    return command


def evaluate_checkpoint(command: Command, log: "Log", stop: "StopSignals") -> None:
    """Reads the checkpoint, evaluates as training does, and says what came out."""
    from cnn.datasets.loader import build_loader
    from cnn.inference import evaluation
    from cnn.inference.trained_model import load_trained_model
    from cnn.metrics.running import EvaluationMetrics
    from cnn.metrics.scores import result_metrics
    from cnn.training.engine import evaluate
    from cnn.utils.environment import make_deterministic
    from cnn.utils.progress import show_progress

    split, trained = command.split, load_trained_model(command.checkpoint, command.settings)
    command.places.update(trained.places)
    cfg, classes, device = trained.cfg, trained.classes, trained.device
    if cfg.train.deterministic:
        make_deterministic()
    logger.info("%s", trained)
    subject = evaluation.choose_images(trained, split)
    number = len(subject.images)
    logger.info("%s: %d images; %s on %s", subject.description, number, trained.precision, device)
    pre = trained.preprocessing
    loader = build_loader(cfg.data, subject.images, pre, device, cfg.seed, training=False)
    loss = evaluation.build_loss_of(trained, subject)
    evaluation_metrics = EvaluationMetrics(device, len(classes), result_metrics(len(classes)))
    batches = show_progress(loader.batches(), split, len(loader), 0, cfg.log.every_seconds)
    key = {"seed": cfg.seed, "epoch": trained.drawing_epoch(split)}
    metrics = evaluate(
        trained.model, batches, loss, trained.autocast, f"{split}_", evaluation_metrics, **key
    )
    matrix = evaluation_metrics.confusion().numpy()
    said = verdict(trained, metrics, split) if subject.is_own else None
    write_stdout(
        "\n".join(["", as_text(metrics, matrix, classes), *([f"{said}\n"] if said else [])])
    )
    if command.json:
        text = as_json(trained, subject, split, metrics, matrix)
        write_output(command.json, text.encode("utf-8", "backslashreplace"))
    if command.figure:
        draw(command.figure, matrix, classes, f"{subject.description}, {command.checkpoint}")


def draw(path: Path, matrix: "np.ndarray", classes: list[str], title: str) -> None:
    """Writes the confusion matrix as a picture, if matplotlib is there."""
    from cnn.records import figures

    if not figures.is_available():
        logger.warning("%s is left out (pip install matplotlib)", path)
        return
    write_output(path, figures.confusion_png(matrix, classes, title))


# -- what training reported ------------------------------------------------------------------------


def reported(trained: "TrainedModel", split: str) -> "Metrics | None":
    """What training reported of these very weights, or None where it has not measured them."""
    from cnn.utils.checkpoint import read_checkpoint
    from cnn.utils.run_folder import LAST

    content = trained.content
    if trained.is_within_epoch:
        return None
    if split == "val":
        row = content["history"][-1] if content["history"] else {}
        measured = row.get("epoch") == content["epoch"]
        return {k: v for k, v in row.items() if k.startswith("val_")} if measured else None
    if content["test"] is None:  # best.pth is from before the test, last.pth from after it
        try:
            content = read_checkpoint(trained.path.with_name(LAST))
        except Refused:
            return None
        if content["started"] != trained.content["started"]:
            return None
    best = content["best"]
    is_best = best is None or best["epoch"] == trained.content["epoch"]
    return content["test"] if is_best else None


def verdict(trained: "TrainedModel", metrics: "Metrics", split: str) -> str | None:
    """Whether the figures are those that training reported; None where it reported none."""
    from cnn.utils import environment as env

    before = reported(trained, split)
    if before is None:
        return None
    differing = [name for name in before if name in metrics and before[name] != metrics[name]]
    if not differing:
        return "training reported the same figures, to the last digit"
    changes = env.environment_changes(
        trained.content["environment"], env.describe(trained.device, trained.precision)
    )
    then, now = trained.content["config"]["data"]["batch_size"], trained.cfg.data.batch_size
    changes += [f"data.batch_size {then} → {now}"] if then != now else []
    reason = f"{', '.join(changes)}: equal up to rounding" if changes else "has the code changed?"
    figures = ", ".join(f"{name} {before[name]}, now {metrics[name]}" for name in differing)
    return f"training reported {figures} ({reason})"


# -- what is shown ---------------------------------------------------------------------------------


def as_text(metrics: dict[str, float | None], matrix: "np.ndarray", classes: list[str]) -> str:
    """Figures, a row a class, and what is mixed up most."""
    import numpy as np

    from cnn.metrics import scores
    from cnn.records.pages import CLASS_HEAD, class_rows
    from cnn.utils.screen import align_columns, escape_unprintable

    names = [escape_unprintable(name) for name in classes]
    lines = align_columns([[name, _shown(name, value, matrix)] for name, value in metrics.items()])
    if len(classes) == 2:
        lines.append(f"positive: {names[1]}")
    rows, means = class_rows(matrix, names)
    if len(rows) > MAX_ROWS:
        worst = np.argsort(np.nan_to_num(scores.per_class(matrix)["f1"], nan=2), kind="stable")
        rows = [rows[number] for number in worst[:MAX_ROWS]]
        means.append([f"({MAX_ROWS} of {len(classes)} classes, the worst)", *[""] * 5])
    lines += ["", *align_columns([CLASS_HEAD, *rows, *means], right=range(1, len(CLASS_HEAD)))]
    pairs = scores.most_confused(matrix, MAX_PAIRS)
    if pairs:
        lines += ["", "most mixed up"]
        lines += align_columns(
            [
                [
                    f"  {names[label]}",
                    f"taken for {names[said]}",
                    f"{count} of {matrix[label].sum()}",
                ]
                for label, said, count in pairs
            ]
        )
    return "\n".join(lines) + "\n"


def _shown(name: str, value: float | None, matrix: "np.ndarray") -> str:
    from cnn.metrics.scores import with_interval

    if name in ("val_acc", "test_acc"):
        return with_interval(value, int(matrix.sum()))
    return "n/a" if value is None else f"{value:.4f}"


def as_json(
    trained: "TrainedModel",
    subject: "EvaluationData",
    split: str,
    metrics: dict[str, float | None],
    matrix: "np.ndarray",
) -> str:
    """All of it, every digit; what is undefined is null."""
    from cnn.metrics import scores
    from cnn.utils import environment as env

    values = scores.per_class(matrix)
    values["images"] = values.pop("support")
    content, number = trained.content, int(matrix.sum())
    return (
        json.dumps(
            {
                "checkpoint": str(trained.path),
                "epoch": content["epoch"],
                "step": content["step"],
                "model": trained.cfg.model.name,
                "data": {"name": trained.cfg.data.name, "root": trained.cfg.data.root},
                "split": split,
                "images": number,
                "own_data": subject.is_own,
                "metrics": {name: _plain(value) for name, value in metrics.items()},
                "acc_interval": scores.wilson(matrix.trace().item(), number),
                "reported": reported(trained, split) if subject.is_own else None,
                "classes": [
                    {"class": name} | {key: _plain(v[row]) for key, v in values.items()}
                    for row, name in enumerate(trained.classes)
                ],
                "confusion_matrix": matrix.tolist(),
                "environment": env.describe(trained.device, trained.precision),
            },
            indent=2,
            ensure_ascii=False,
            allow_nan=False,
        )
        + "\n"
    )


def _plain(value: Any) -> float | int | None:
    value = value.item() if hasattr(value, "item") else value  # NumPy's
    return None if value is None or not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
