"""Evaluates a trained model on the data of its training, or on other data with the same classes.

Commands:

    python evaluate.py                                 the best epoch on the test images
    python evaluate.py --split val                     on the validation images
    python evaluate.py --checkpoint checkpoints/a/best.pth
    python evaluate.py data.root=photos2               on other images of the same classes
    python evaluate.py --json result.json --figure confusion.png
    python evaluate.py --sensitivity 0.95              at the threshold that reaches it on val

All other settings come from the checkpoint. Only the files that are named here are written, and,
with --save-threshold, the threshold into the checkpoint.
"""

import json
import logging
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cnn import cli
from cnn.errors import Failed, Refused
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
POINTS = ("sensitivity", "specificity")  # that can choose a threshold
MAX_ROWS = 40  # classes in the printed table
MAX_PAIRS = 5  # pairs of confused classes in the printed list


class Command(cli.Command):
    """The parsed command line of evaluate.py.

    Attributes:
        split: the images for the evaluation, "val" or "test".
        json: the JSON file for all metrics; None for no file.
        figure: the .png file for the confusion matrix; None for no file.
        sensitivity, specificity: what the threshold for the positive class shall reach on the
            validation images. At most one is not None.
        prevalence: the share of positives for the predictive values; None for that of the images.
        save_threshold: whether to write the threshold into the checkpoint.
    """

    split: str
    json: Path | None
    figure: Path | None
    sensitivity: float | None
    specificity: float | None
    prevalence: float | None
    save_threshold: bool


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
    either = parser.add_mutually_exclusive_group()
    for name in POINTS:
        text = f"choose the threshold of the positive class that reaches this {name} on val"
        either.add_argument(f"--{name}", type=float, metavar="X", help=text)
    add("--prevalence", type=float, metavar="X", help="share of positives, for ppv and npv")
    add("--save-threshold", action="store_true", help="write the threshold into the checkpoint")
    parser.add_settings(", ".join(SETTINGS))
    command = parser.parse_intermixed_args(argv, Command())
    cli.check_settings(command.settings, SETTINGS)
    for name in (*POINTS, "prevalence"):
        value = getattr(command, name)
        if value is not None and not 0 < value < 1:
            raise Refused(f"--{name}: expected a share above 0 and below 1, got {value:g}")
    if command.save_threshold and command.sensitivity is command.specificity is None:
        raise Refused("--save-threshold: expected --sensitivity X or --specificity X, too")
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
    file, too. With --figure, the confusion matrix is drawn in a PNG file. With --save-threshold,
    the threshold is written into the checkpoint.
    """
    from cnn.datasets.decode import silence_pillow
    from cnn.inference.trained_model import load_trained_model
    from cnn.utils.environment import make_deterministic

    silence_pillow()
    trained = load_trained_model(command.checkpoint, command.settings)
    command.places.update(trained.places)
    if trained.cfg.train.deterministic:
        make_deterministic()
    logger.info("%s", trained)
    check_threshold(trained, command)
    found = evaluate_split(trained, command.split)
    tell_trained_on(command.checkpoint, found)
    point = operating_point(trained, command, found)
    metrics, matrix, classes = found.metrics, found.matrix, trained.classes
    reported = reported_metrics(trained, found.split) if found.subject.is_same_data else None
    text = "\n" + as_text(metrics, found.ends, matrix, classes, found.num_groups)
    if point is not None:
        text += "\n" + point_as_text(point, classes[1])
    if reported is not None:
        text += "\n" + compare_with_training(trained, metrics, reported) + "\n"
    write_stdout(text)
    if command.json:
        text = as_json(trained, found, reported, point)
        write_output(command.json, text.encode("utf-8", "backslashreplace"))
    if command.figure:
        draw(command.figure, matrix, classes, f"{found.subject.description}, {command.checkpoint}")
    if command.save_threshold:
        save_threshold(trained, point["threshold"])


@dataclass(frozen=True)
class Evaluated:
    """The result of an evaluation.

    Attributes:
        subject: the images.
        split: "val" or "test".
        metrics: the metrics by name, such as "test_acc". An undefined metric is None.
        ends: the lower and upper ends of the metrics' 95 % intervals, by the same names.
        matrix: the numbers of images, integers of shape (classes, classes). Each row is for a
            label, and each column is for a predicted class.
        probabilities: the probability of each class for each image (N, classes). None if images
            were left out, so that it is unknown which image is which.
    """

    subject: "EvaluationData"
    split: str
    metrics: "Metrics"
    ends: "dict[str, Interval]"
    matrix: "np.ndarray"
    probabilities: "np.ndarray | None"

    @property
    def num_groups(self) -> int | None:
        """The number of groups of images, such as patients; None without groups."""
        names = self.subject.images.group_names
        return None if names is None else len(set(names))


def evaluate_split(trained: "TrainedModel", split: str) -> Evaluated:
    """Evaluates a model on the images of a split, "val" or "test"."""
    from cnn.datasets.loader import build_loader
    from cnn.inference import evaluation
    from cnn.metrics.intervals import intervals
    from cnn.metrics.running import EvaluationMetrics
    from cnn.metrics.scores import result_metrics
    from cnn.training.engine import evaluate
    from cnn.utils.progress import show_progress

    cfg, device, num_classes = trained.cfg, trained.device, len(trained.classes)
    subject = evaluation.choose_images(trained, split)
    images = subject.images
    facts = subject.description, len(images), trained.precision, device
    logger.info("%s: %d images; %s on %s", *facts)
    pre = trained.preprocessing
    loader = build_loader(cfg.data, images, pre, device, cfg.seed, training=False)
    loss = evaluation.build_training_loss(trained, subject)
    options = {"keeps_probabilities": True, "temperature": trained.temperature}
    running = EvaluationMetrics(device, num_classes, result_metrics(num_classes), **options)
    batches = show_progress(loader.batches(), split, len(loader), 0, cfg.log.every_seconds)
    key = {"seed": cfg.seed, "epoch": trained.seed_epoch(split)}
    values = evaluate(trained.model, batches, loss, trained.autocast, running, **key)
    columns, ends = [column.numpy() for column in running.predictions().values()], {}
    predictions, _, probabilities = columns
    if len(predictions) == len(images):
        ends = intervals(images.labels, predictions, probabilities, images.group_names)
    metrics, ends = ({f"{split}_{k}": v for k, v in named.items()} for named in (values, ends))
    matrix = running.confusion().numpy()
    return Evaluated(subject, split, metrics, ends, matrix, probabilities if ends else None)


def tell_trained_on(checkpoint: Path, found: Evaluated) -> None:
    """Logs how many images of other data than those of the training were trained on.

    Copies are found by their pixels, if the data of the training can still be read.
    """
    import numpy as np

    from cnn.inference.evaluation import choose_images
    from cnn.inference.trained_model import load_trained_model

    images = found.subject.images
    if found.subject.is_same_data:
        return
    try:
        train = choose_images(load_trained_model(checkpoint, []), "test").train
    except Refused:
        logger.warning("the training's data cannot be read: are these images new to the model?")
        return
    number = int(np.isin(images.identities(), train.identities()).sum())
    if number:
        logger.warning("%d of %d images were trained on: not a test", number, len(images))


# -- the operating point ---------------------------------------------------------------------------


def check_threshold(trained: "TrainedModel", command: Command) -> None:
    """Raises Refused if the model can have no threshold that the command line asks for."""
    wanted = [name for name in POINTS if getattr(command, name) is not None]
    if wanted and len(trained.classes) != 2:
        raise Refused(f"--{wanted[0]}: is for two classes, got {len(trained.classes)}")
    if command.prevalence is not None and not wanted and trained.threshold is None:
        raise Refused("--prevalence: is for a threshold; expected --sensitivity X, too")


def operating_point(
    trained: "TrainedModel", command: Command, found: Evaluated
) -> dict[str, Any] | None:
    """Returns the threshold for the positive class, and its figures.

    With --sensitivity or --specificity, the threshold is chosen on the validation images of the
    training. Otherwise it is that of the checkpoint.

    Args:
        trained: the model with the checkpoint.
        command: the command line.
        found: the evaluation of the split that the command line names.

    Returns:
        A dict with "threshold", "chosen" (how), "prevalence" and the splits. A split has a dict of
        (value, interval) by name. None without a threshold.

    Raises:
        Refused: images were left out, or the command line names other data than those of the
            training.
    """
    from cnn.metrics.threshold import at_threshold, choose_threshold

    wanted = {name: getattr(command, name) for name in POINTS if getattr(command, name) is not None}
    if not wanted and trained.threshold is None:
        return None
    evaluations = evaluations_for_threshold(trained, found, min(wanted)) if wanted else [found]
    for each in evaluations:
        if each.probabilities is None:
            raise Refused(f"{each.subject.description}: images were left out: no threshold")
        if wanted and not 0 < each.subject.images.labels.mean() < 1:
            raise Refused(f"{each.subject.description}: expected images of both classes")
    for name, value in wanted.items():
        labels = evaluations[0].subject.images.labels
        number = int((labels == (name == "sensitivity")).sum())
        if number * (1 - value) < 1:
            logger.warning("--%s %g of %d validation images is all of them", name, value, number)
    columns = [(e.subject.images.labels, e.probabilities[:, 1]) for e in evaluations]
    threshold = choose_threshold(*columns[0], **wanted) if wanted else trained.threshold
    if not 0 < threshold < 1:
        reached = f"--{min(wanted)}: only a threshold of {threshold:g} would reach it"
        raise Refused(f"{reached}; the probabilities are all near 0 and 1")
    chosen = " ".join(f"{name} {value:g} on val" for name, value in wanted.items())
    point = {"threshold": threshold, "chosen": chosen or "saved", "prevalence": command.prevalence}
    for each, column in zip(evaluations, columns):
        groups = each.subject.images.group_names
        point[each.split] = at_threshold(*column, threshold, groups, command.prevalence)
    return point


def evaluations_for_threshold(
    trained: "TrainedModel", found: Evaluated, option: str
) -> list[Evaluated]:
    """Returns the evaluation of the validation images and, unless it is the same, another one.

    Raises:
        Refused: the command line names other data.
    """
    if not found.subject.is_same_data:
        advice = "choose it first, with --save-threshold and without naming other data"
        raise Refused(f"--{option}: chosen on the validation of the training; {advice}")
    return [found] if found.split == "val" else [evaluate_split(trained, "val"), found]


def point_as_text(point: dict[str, Any], positive: str) -> str:
    """Formats an operating point as text for the screen.

    Args:
        point: the result of `operating_point`.
        positive: the name of the positive class.
    """
    from cnn.metrics.scores import with_interval
    from cnn.utils.screen import align_columns, escape_unprintable

    splits = [split for split in ("val", "test") if split in point]
    rows = [[point["chosen"], *splits]]
    for name in point[splits[0]]:
        rows.append([name, *(with_interval(*point[split][name]) for split in splits)])
    at = f"with a threshold: {escape_unprintable(positive)} from {point['threshold']:.4f} on"
    given = point["prevalence"]
    of = "" if given is None else f"; ppv and npv at a prevalence of {given:g}"
    return "\n".join([f"{at}{of}", *align_columns(rows)]) + "\n"


def flat_point(point: dict[str, Any]) -> dict[str, Any]:
    """Returns an operating point with a key for each figure and interval, such as "test_ppv_95"."""
    flat = {name: each for name, each in point.items() if not isinstance(each, dict)}
    for split in (name for name in point if name not in flat):
        for name, (value, ends) in point[split].items():
            flat |= {f"{split}_{name}": value, f"{split}_{name}_95": ends}
    return flat


def save_threshold(trained: "TrainedModel", threshold: float) -> None:
    """Writes a threshold into the checkpoint of a model. All else in the file stays.

    Raises:
        Failed: the file cannot be written, and stays as it was.
    """
    from cnn.utils.checkpoint import save_checkpoint

    try:
        save_checkpoint(trained.content | {"threshold": threshold}, trained.path)
    except OSError as error:
        raise Failed(f"{trained.path}: cannot be written: {error.strerror or error}") from None
    logger.info("%s: predict.py and export.py use the threshold %.4f", trained.path, threshold)


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
    if best is not None and best["epoch"] != trained.content["epoch"]:
        return None
    if (content.get("temperature") or 1.0) == trained.temperature:
        return content["test"]
    return {
        name: value
        for name, value in content["test"].items()
        if not name.removeprefix("test_").startswith(FROM_PROBABILITIES)
    }


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
    num_groups: int | None = None,
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
        num_groups: the number of groups of images; None without groups.
    """
    import numpy as np

    from cnn.metrics import scores
    from cnn.metrics.intervals import FEW_GROUPS
    from cnn.records.pages import CLASS_HEAD, class_rows
    from cnn.utils.screen import align_columns, escape_unprintable

    names = [escape_unprintable(name) for name in classes]
    values = [(name, scores.with_interval(v, ends.get(name))) for name, v in metrics.items()]
    lines = align_columns(values)
    if len(classes) == 2:
        lines.append(f"positive: {names[1]}")
    if num_groups is not None:
        rough = f"; below {FEW_GROUPS}, the intervals are rough" if num_groups < FEW_GROUPS else ""
        lines.append(f"groups: {num_groups}{rough}")
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
    found: Evaluated,
    reported: "Metrics | None",
    point: dict[str, Any] | None,
) -> str:
    """Formats the results of an evaluation as JSON, with all digits of each metric.

    An undefined metric becomes null. The 95 % interval of a metric has "_95" after its name.

    Args:
        trained: the model with the checkpoint.
        found: the evaluation.
        reported: the metrics from training for the same weights and images; None if there are none.
        point: the operating point; None without a threshold.
    """
    from cnn.metrics import scores
    from cnn.utils import environment as env

    values = scores.per_class(found.matrix)
    values["images"] = values.pop("support")
    content, number = trained.content, int(found.matrix.sum())
    metrics = {name: _finite(value) for name, value in found.metrics.items()}
    metrics |= {f"{name}_95": pair for name, pair in found.ends.items()}
    result = {
        "checkpoint": str(trained.path),
        "epoch": content["epoch"],
        "step": content["step"],
        "model": trained.cfg.model.name,
        "data": {"name": trained.cfg.data.name, "root": trained.cfg.data.root},
        "split": found.split,
        "images": number,
        "groups": found.num_groups,
        "positive": trained.classes[1] if len(trained.classes) == 2 else None,
        "own_data": found.subject.is_same_data,
        "temperature": trained.temperature,
        "metrics": metrics,
        "operating_point": point and flat_point(point),
        "reported": reported,
        "classes": [
            {"class": name} | {key: _finite(v[row].item()) for key, v in values.items()}
            for row, name in enumerate(trained.classes)
        ],
        "confusion_matrix": found.matrix.tolist(),
        "environment": env.describe(trained.device, trained.precision),
    }
    return json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def _finite(value: float | None) -> float | None:
    """Returns a finite value unchanged, and None for NaN, an infinite value or None."""
    return value if value is not None and math.isfinite(value) else None


if __name__ == "__main__":
    sys.exit(main())
