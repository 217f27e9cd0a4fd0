"""Evaluates a trained model on the data of its training, or on other data with the same classes.

Commands:

    python evaluate.py                                 the best epoch on the test images
    python evaluate.py --split val                     on the validation images
    python evaluate.py --checkpoint checkpoints/a/best.pth
    python evaluate.py data.root=photos2               on other images of the same classes
    python evaluate.py --json result.json --figure confusion.png

All other settings come from the checkpoint. Only the files that are named here are written.
"""

import json
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import cli
from cnn.errors import Refused
from cnn.utils.outputs import check_output, write_output
from cnn.utils.screen import write_stdout

if TYPE_CHECKING:
    import numpy as np

    from cnn.inference.evaluation import EvaluationData
    from cnn.inference.trained_model import TrainedModel
    from cnn.metrics.intervals import Interval
    from cnn.metrics.scores import Metrics

logger = logging.getLogger("cnn.evaluate")

# Settings that say where the images are and how they are loaded; none of them defines the model.
SOURCE = (
    *("data.name", "data.root", "data.layout", "data.args", "data.download", "data.on_bad_image"),
    "data.group",
)
LOADING = ("data.batch_size", "data.num_workers", "data.in_memory", "train.precision")
SETTINGS = ("device", *SOURCE, *LOADING, "log.every_seconds")
TITLE = "Confusion matrix of evaluate.py"  # within the PNG file
# The files of --json and of --figure.
RESULT = (rb'\{\n  "checkpoint": "', b'\n  "confusion_matrix": ')
FIGURE = (rb"\x89PNG", TITLE.encode())
MAX_ROWS = 40  # classes in the printed table
MAX_PAIRS = 5  # pairs of confused classes in the printed list


class Command(cli.Command):
    """The parsed command line of evaluate.py.

    Attributes:
        split: the images for the evaluation, "val" or "test".
        json: the JSON file for all metrics; None for no file.
        figure: the .png file for the confusion matrix; None for no file.
    """

    split: str
    json: Path | None
    figure: Path | None


def main(argv: list[str] | None = None) -> int:
    """Runs the script, and returns the exit status.

    Args:
        argv: the arguments of the command line; None for the arguments of this process.
    """
    return cli.main(prepare, argv)


def prepare(argv: list[str]) -> cli.Task:
    """Reads the command line, and returns the work to do.

    Raises:
        Refused: the command line is not valid, or a file is missing.
    """
    command = parse(argv)
    module = "cnn.inference.evaluation"
    return cli.Task(lambda *_: evaluate_checkpoint(command), command.places, module)


def parse(argv: list[str]) -> Command:
    """Reads the command line.

    Raises:
        Refused: the command line is not valid, or the checkpoint does not exist.
    """
    parser = cli.Parser("evaluate.py", __doc__)
    parser.add_checkpoint()
    add = parser.add_argument
    add("--split", choices=("val", "test"), default="test", help="which images (default: test)")
    add("--json", type=Path, metavar="FILE", help="write every figure with all digits to FILE")
    add("--figure", type=Path, metavar="FILE", help="draw the confusion matrix to FILE (.png)")
    parser.add_settings(", ".join(SETTINGS))
    command = parser.parse_intermixed_args(argv, Command())
    cli.check_settings(command.settings, SETTINGS)
    if command.figure and command.figure.suffix.lower() != ".png":
        raise Refused(f"--figure: expected a name that ends with .png, got {command.figure}")
    if command.json is not None:
        check_output("--json", command.json, RESULT, [command.checkpoint])
    if command.figure is not None:
        check_output("--figure", command.figure, FIGURE, [command.checkpoint, command.json])
    cli.check_checkpoint(command.checkpoint)
    return command


def evaluate_checkpoint(command: Command) -> None:
    """Evaluates the model of a checkpoint, and prints the metrics.

    The evaluation is the same as during training. With --json, the metrics are written to a JSON
    file, too. With --figure, the confusion matrix is drawn in a PNG file.
    """
    from cnn.datasets.decode import silence_pillow
    from cnn.datasets.loader import build_loader
    from cnn.inference import evaluation
    from cnn.inference.trained_model import load_trained_model
    from cnn.metrics.intervals import intervals
    from cnn.metrics.running import EvaluationMetrics
    from cnn.metrics.scores import result_metrics
    from cnn.training.engine import evaluate
    from cnn.utils.environment import make_deterministic
    from cnn.utils.progress import show_progress

    silence_pillow()
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
    loss = evaluation.build_training_loss(trained, subject)
    names = result_metrics(len(classes))
    options = {"keeps_probabilities": True, "temperature": trained.temperature}
    evaluation_metrics = EvaluationMetrics(device, len(classes), names, **options)
    batches = show_progress(loader.batches(), split, len(loader), 0, cfg.log.every_seconds)
    key = {"seed": cfg.seed, "epoch": trained.seed_epoch(split)}
    values = evaluate(trained.model, batches, loss, trained.autocast, evaluation_metrics, **key)
    metrics = {f"{split}_{name}": value for name, value in values.items()}
    matrix, ends = evaluation_metrics.confusion().numpy(), {}
    found = evaluation_metrics.predictions()
    if len(found["prediction"]) == number:  # else images were left out, and the labels are unknown
        columns = found["prediction"].numpy(), found["probabilities"].numpy()
        ends = intervals(subject.images.labels, *columns, subject.images.group_names)
    ends = {f"{split}_{name}": pair for name, pair in ends.items()}
    reported = reported_metrics(trained, split) if subject.is_same_data else None
    text = "\n" + as_text(metrics, ends, matrix, classes)
    if reported is not None:
        text += "\n" + compare_with_training(trained, metrics, reported) + "\n"
    write_stdout(text)
    if command.json:
        text = as_json(trained, subject, split, metrics, ends, matrix, reported)
        write_output(command.json, text.encode("utf-8", "backslashreplace"))
    if command.figure:
        draw(command.figure, matrix, classes, f"{subject.description}, {command.checkpoint}")


# -- what training reported ------------------------------------------------------------------------


def reported_metrics(trained: "TrainedModel", split: str) -> "Metrics | None":
    """Returns the metrics that training reported for the weights in a checkpoint.

    Args:
        trained: the model with the checkpoint.
        split: "val" or "test".

    Returns:
        The metrics by name, such as "val_acc". The result is None if training did not evaluate the
        weights on the split. The result is also None if no readable file has the metrics.
    """
    from cnn.metrics.scores import FROM_PROBABILITIES
    from cnn.utils.checkpoint import read_checkpoint
    from cnn.utils.run_folder import LAST

    content = trained.content
    if trained.is_within_epoch:
        return None
    if split == "val":
        row = content["history"][-1] if content["history"] else {}
        hidden = () if trained.temperature == 1 else FROM_PROBABILITIES  # it came afterwards
        metrics = {
            name: value
            for name, value in row.items()
            if name.startswith("val_") and name.removeprefix("val_") not in hidden
        }
        return metrics if row.get("epoch") == content["epoch"] else None
    if content["test"] is None:  # best.pth is saved before the test, last.pth after it
        try:
            content = read_checkpoint(trained.path.with_name(LAST))
        except Refused:
            return None
        if content["started"] != trained.content["started"]:
            return None
    best = content["best"]
    is_best = best is None or best["epoch"] == trained.content["epoch"]
    return content["test"] if is_best else None


def compare_with_training(trained: "TrainedModel", metrics: "Metrics", reported: "Metrics") -> str:
    """Returns a sentence that compares the metrics with the metrics from training.

    If metrics differ, the sentence lists the old and the new values. The sentence then names
    changes of the software, the hardware or the batch size since training. If there are no such
    changes, the sentence asks whether the code has changed.

    Args:
        trained: the model with the checkpoint.
        metrics: the metrics of the present evaluation by name, such as "test_acc".
        reported: the metrics from training, by the same names.
    """
    from cnn.utils import environment as env

    differing = [name for name in reported if name in metrics and metrics[name] != reported[name]]
    if not differing:
        return "training reported the same figures, to the last digit"
    changes = env.environment_changes(
        trained.content["environment"], env.describe(trained.device, trained.precision)
    )
    then, now = trained.content["config"]["data"]["batch_size"], trained.cfg.data.batch_size
    if then != now:
        changes = [*changes, f"data.batch_size {then} → {now}"]
    reason = f"{', '.join(changes)}: equal up to rounding" if changes else "has the code changed?"
    figures = ", ".join(f"{name} {reported[name]}, now {metrics[name]}" for name in differing)
    return f"training reported {figures} ({reason})"


# -- output ----------------------------------------------------------------------------------------


def draw(path: Path, matrix: "np.ndarray", classes: list[str], title: str) -> None:
    """Draws a confusion matrix in a PNG file.

    If matplotlib is not installed, a warning is logged, and no file is written.

    Args:
        path: the path of the PNG file.
        matrix: the numbers of images, integers of shape (classes, classes). Each row is for a
            label, and each column is for a predicted class.
        classes: the names of the classes, in the order of the rows.
        title: the text above the matrix.

    Raises:
        Failed: the file cannot be written.
    """
    from cnn.records import figures

    if figures.is_available():
        write_output(path, figures.png(figures.draw_confusion, matrix, classes, title, mark=TITLE))
    else:
        logger.warning("%s is left out (pip install matplotlib)", path)


def as_text(
    metrics: "Metrics",
    ends: "dict[str, Interval]",
    matrix: "np.ndarray",
    classes: list[str],
) -> str:
    """Formats the results of an evaluation as text for the screen.

    The text lists the metrics, the metrics of each class, and the most confused pairs of classes.
    At most 40 classes are listed: the classes with the lowest F1.

    Args:
        metrics: the metrics by name, such as "test_acc". An undefined metric is None.
        ends: the lower and upper ends of the metrics' 95 % intervals, by the same names.
        matrix: the numbers of images, integers of shape (classes, classes). Each row is for a
            label, and each column is for a predicted class.
        classes: the names of the classes, in the order of the rows.
    """
    import numpy as np

    from cnn.metrics import scores
    from cnn.records.pages import CLASS_HEAD, class_rows
    from cnn.utils.screen import align_columns, escape_unprintable

    names = [escape_unprintable(name) for name in classes]
    values = [(name, scores.with_interval(v, ends.get(name))) for name, v in metrics.items()]
    lines = align_columns(values)
    if len(classes) == 2:
        lines.append(f"positive: {names[1]}")
    rows, means = class_rows(matrix, names)
    if len(rows) > MAX_ROWS:
        worst = np.argsort(np.nan_to_num(scores.per_class(matrix)["f1"], nan=2), kind="stable")
        rows = [rows[number] for number in worst[:MAX_ROWS]]
        means.append([f"({MAX_ROWS} of {len(classes)} classes, the worst)", *[""] * 5])
    lines += ["", *align_columns([CLASS_HEAD, *rows, *means], right=range(1, len(CLASS_HEAD)))]
    confused = [
        [f"  {names[label]}", f"taken for {names[other]}", f"{count} of {matrix[label].sum()}"]
        for label, other, count in scores.most_confused(matrix, MAX_PAIRS)
    ]
    if confused:
        lines += ["", "most mixed up", *align_columns(confused)]
    return "\n".join(lines) + "\n"


def as_json(
    trained: "TrainedModel",
    subject: "EvaluationData",
    split: str,
    metrics: "Metrics",
    ends: "dict[str, Interval]",
    matrix: "np.ndarray",
    reported: "Metrics | None",
) -> str:
    """Formats the results of an evaluation as JSON, with all digits of each metric.

    An undefined metric becomes null.

    Args:
        trained: the model with the checkpoint.
        subject: the images of the evaluation.
        split: "val" or "test".
        metrics: the metrics by name, such as "test_acc". An undefined metric is None.
        ends: the lower and upper ends of the metrics' 95 % intervals, by the same names.
        matrix: the numbers of images, integers of shape (classes, classes). Each row is for a
            label, and each column is for a predicted class.
        reported: the metrics from training for the same weights and images; None if there are none.
    """
    from cnn.metrics import scores
    from cnn.utils import environment as env

    values = scores.per_class(matrix)
    values["images"] = values.pop("support")
    content, number = trained.content, int(matrix.sum())
    with_ends = {f"{name}_95": pair for name, pair in ends.items()}
    result = {
        "checkpoint": str(trained.path),
        "epoch": content["epoch"],
        "step": content["step"],
        "model": trained.cfg.model.name,
        "data": {"name": trained.cfg.data.name, "root": trained.cfg.data.root},
        "split": split,
        "images": number,
        "own_data": subject.is_same_data,
        "metrics": {name: _finite(value) for name, value in metrics.items()} | with_ends,
        "reported": reported,
        "classes": [
            {"class": name} | {key: _finite(v[row].item()) for key, v in values.items()}
            for row, name in enumerate(trained.classes)
        ],
        "confusion_matrix": matrix.tolist(),
        "environment": env.describe(trained.device, trained.precision),
    }
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: float | None) -> float | None:
    """Returns a finite value unchanged, and None for NaN, an infinite value or None."""
    return value if value is not None and math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
