"""Measures a trained model: on the data it was trained for, or on other data with its classes.

Commands:

    python evaluate.py                                  the best epoch, on its test images
    python evaluate.py --split val                      ... on those that it was chosen by
    python evaluate.py --checkpoint checkpoints/a/best.pth
    python evaluate.py data.root=photos2                on other images with the same classes
    python evaluate.py --json result.json --figure confusion.png

Settings come from the checkpoint. Nothing is written but what is asked for.
"""

import logging
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import arguments, cli
from cnn.utils.files import write_atomically
from cnn.utils.screen import say

if TYPE_CHECKING:
    import numpy as np

    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger("cnn.evaluate")

# Where the images are and how they are read; nothing of what the model is.
SETTINGS = (
    *("device", "data.name", "data.root", "data.args", "data.download", "data.batch_size"),
    *("data.num_workers", "data.in_memory", "data.on_bad_image", "train.precision"),
    "log.every_seconds",
)


@dataclass(frozen=True)
class Command:
    checkpoint: Path
    split: str
    json: Path | None
    figure: Path | None
    settings: list[str]
    places: dict[str, str] = field(default_factory=dict)  # where each setting was given


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return arguments.guarded(lambda: obey(words))


def obey(argv: list[str]) -> int:
    command = parse(argv)
    return cli.run(lambda log, stop: evaluate_checkpoint(command, log, stop), command.places)


def parse(argv: list[str]) -> Command:
    """Reads the command line, and looks whether what it names is there.

    Raises:
        Refused: a setting or a file that cannot be.
    """
    parser = arguments.parser("evaluate.py", __doc__)
    add = parser.add_argument
    add("--split", choices=("val", "test"), default="test", help="which images (default test)")
    add("--json", type=Path, metavar="FILE", help="write every figure, with all digits")
    add("--figure", type=Path, metavar="FILE", help="draw the confusion matrix (.png)")
    add("settings", nargs="*", metavar="key=value", help=f"{', '.join(SETTINGS)}")
    args = parser.parse_intermixed_args(argv)
    arguments.check_settings(args.settings, SETTINGS)
    if args.figure and args.figure.suffix.lower() != ".png":
        parser.error(f"--figure: expected a name that ends with .png, got {args.figure}")
    for option, file in (("--json", args.json), ("--figure", args.figure)):
        if file is not None:
            arguments.check_output(option, file)
    arguments.check_checkpoint(args.checkpoint)
    return Command(args.checkpoint, args.split, args.json, args.figure, args.settings)


def evaluate_checkpoint(command: Command, log: "Log", stop: "StopSignals") -> None:
    """Reads the checkpoint, evaluates as training does, and says what came out."""
    from cnn import evaluation
    from cnn.datasets.loading import build_loader
    from cnn.engine import evaluate
    from cnn.metrics import Outcome
    from cnn.scores import result_metrics
    from cnn.trained import load_trained
    from cnn.utils.environment import make_deterministic
    from cnn.utils.progress import follow

    split, trained = command.split, load_trained(command.checkpoint, command.settings)
    command.places.update(trained.places)
    cfg, classes, device = trained.cfg, trained.classes, trained.device
    if cfg.train.deterministic:
        make_deterministic()
    logger.info("%s", trained)
    subject = evaluation.choose_images(trained, split)
    number = len(subject.images)
    logger.info("%s: %d images; %s on %s", subject.about, number, trained.precision, device)
    pre = trained.preprocessing
    loader = build_loader(cfg.data, subject.images, pre, device, cfg.seed, training=False)
    loss = evaluation.build_loss_of(trained, subject)
    outcome = Outcome(device, len(classes), result_metrics(len(classes)))
    batches = follow(loader.batches(), split, len(loader), 0, cfg.log.every_seconds)
    key = {"seed": cfg.seed, "epoch": trained.drawing_epoch(split)}
    metrics = evaluate(trained.model, batches, loss, trained.autocast, f"{split}_", outcome, **key)
    matrix = outcome.confusion().numpy()
    said = evaluation.verdict(trained, metrics, split) if subject.is_own else None
    say(
        "\n".join(
            ["", evaluation.as_text(metrics, matrix, classes), *([f"{said}\n"] if said else [])]
        )
    )
    if command.json:
        text = evaluation.as_json(trained, subject, split, metrics, matrix)
        write(command.json, text.encode("utf-8", "replace"))
    if command.figure:
        draw(command.figure, matrix, classes, f"{subject.about}, {command.checkpoint}")


def draw(path: Path, matrix: "np.ndarray", classes: list[str], title: str) -> None:
    """Writes the confusion matrix as a picture, if matplotlib is there."""
    from cnn import figures

    if not figures.is_available():
        logger.warning("%s is left out (pip install matplotlib)", path)
        return
    write(path, figures.confusion_png(matrix, classes, title))


def write(path: Path, data: bytes) -> None:
    from cnn.saving import Failed

    try:
        write_atomically(path, lambda file: file.write(data))
    except OSError as error:
        raise Failed(f"{path}: cannot be written: {error.strerror or error}") from None


if __name__ == "__main__":
    sys.exit(main())
