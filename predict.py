"""Predicts the classes of images with a trained model; the checkpoint holds all it needs.

Commands:

    python predict.py photo.jpg
    python predict.py new_photos                       a folder with its subfolders
    python predict.py "new_photos/**/*.png" --top 1    a pattern, in quotes
    find . -name "*.jpg" | python predict.py -         a list of files from another program
    python predict.py new_photos --csv predictions.csv
    python predict.py new_photos --checkpoint checkpoints/a/best.pth device=cpu

Images that cannot be read are named and skipped; the exit status is then 1.
"""

import csv
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cnn import cli
from cnn.datasets.image_files import find_images
from cnn.errors import BadImage, Refused
from cnn.utils.files import raising_failed
from cnn.utils.screen import display_width, escape_unprintable, pad, shorten_name, write_stdout

if TYPE_CHECKING:
    from cnn.inference.predictor import Prediction

logger = logging.getLogger("cnn.predict")

SETTINGS = ("device", "data.batch_size", "data.num_workers", "train.precision")
IS_SETTING = re.compile(r"(device|[a-z]+\.[a-z_]+)=")

TOP = 3
BYTES = "surrogateescape"  # writes a file name that is not valid text as its original bytes
MAX_PATH = 60  # columns reserved for a path; a longer one shifts its line to the right


class Command(cli.Command):
    """The parsed command line of predict.py.

    Attributes:
        paths: all positional arguments as typed. The arguments are paths of images and settings
            such as "device=cpu".
        images: the image files that were found.
        missing: a message for each path without an image.
        top: the number of classes to write per image.
        csv: the CSV file for the predictions; None for no file.
    """

    paths: list[str]
    images: list[Path]
    missing: list[str]
    top: int
    csv: Path | None


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
    return cli.Task(lambda *_: predict_images(command), command.places, "cnn.inference.predictor")


def parse(argv: list[str]) -> Command:
    """Reads the command line, and finds the image files at the typed paths.

    Raises:
        Refused: the command line is not valid, no image was found, or the checkpoint does not
            exist.
    """
    parser = cli.Parser("predict.py", __doc__)
    parser.add_checkpoint()
    add = parser.add_argument
    add(
        "paths", nargs="*", metavar="PATH", help="file, folder or pattern; - reads paths from stdin"
    )
    add("--top", type=int, default=TOP, metavar="K", help=f"classes per image (default: {TOP})")
    add("--csv", type=Path, metavar="FILE", help="write the predictions to FILE")
    parser.add_settings(", ".join(SETTINGS))
    command = parser.parse_intermixed_args(argv, Command())
    is_setting = {
        word: bool(IS_SETTING.match(word)) and not os.path.exists(word) for word in command.paths
    }
    command.settings = [word for word in command.paths if is_setting[word]]
    paths = [word for word in command.paths if not is_setting[word]]
    if not paths:
        raise Refused("expected files, folders or patterns, or - to read a list from stdin")
    if command.top < 1:
        raise Refused(f"--top: expected a whole number of at least 1, got {command.top}")
    cli.check_settings(command.settings, SETTINGS)
    if command.csv is not None:
        cli.check_output("--csv", command.csv)
    words = [word for path in paths for word in (read_list() if path == "-" else [path])]
    found = list(find_images(words))
    command.images = [path for path, reason in found if reason is None]
    command.missing = [
        f"{escape_unprintable(path)}: {reason}" for path, reason in found if reason is not None
    ]
    if not command.images:
        raise Refused("\n".join(command.missing[:20]) or "stdin: expected paths, got none")
    cli.check_checkpoint(command.checkpoint)
    return command


def read_list() -> list[str]:
    """Reads a list of paths from stdin.

    Line ends or zero bytes separate the paths. The command `find -print0` writes zero bytes.
    """
    data = sys.stdin.buffer.read()
    parts = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(part) for part in parts if part.strip()]


def predict_images(command: Command) -> int:
    """Predicts the classes of images, and writes each prediction to the screen.

    With --csv, the predictions are written to a CSV file, too. Each prediction is written at once.

    Args:
        command: the command line, which names the images and the checkpoint.

    Returns:
        The exit status: cli.FAILED if an image could not be found or read, otherwise cli.DONE.
    """
    from cnn.datasets.decode import silence_pillow
    from cnn.inference.predictor import Predictor
    from cnn.inference.trained_model import load_trained_model
    from cnn.utils.progress import show_progress

    silence_pillow()
    trained = load_trained_model(command.checkpoint, command.settings)
    command.places.update(trained.places)
    logger.info("%s", trained)
    predictor, images = Predictor(trained), command.images
    for line in command.missing:
        logger.error("%s", line)
    num_bad, top = len(command.missing), min(command.top, len(predictor.classes))
    with CsvFile(command.csv, top) as file:
        table = Table(images, predictor.classes, top)
        table.write_head()
        predictions = predictor.predict_each(images, top)
        shown = show_progress(predictions, "predicting", len(images))
        for path, prediction in zip(images, shown, strict=True):
            if isinstance(prediction, BadImage):
                num_bad += 1
                logger.error("%s", escape_unprintable(prediction))
            else:
                table.write_row(path, prediction)
                file.write_row(path, prediction)
    if not num_bad:
        return cli.DONE
    logger.error("%d of %d could not be read", num_bad, len(images) + len(command.missing))
    return cli.FAILED


class Table:
    """A table on the screen that shows the predicted classes of each image.

    Args:
        images: the paths of all images. The longest path sets the width of the column of paths.
        classes: the names of the model's classes. The longest name sets the width of the other
            columns.
        top: the number of classes to show per image.
    """

    def __init__(self, images: list[Path], classes: list[str], top: int):
        self.top = top
        self.path_width = min(
            max(display_width(escape_unprintable(path)) for path in [*images, "image"]), MAX_PATH
        )
        self.name_width = max(
            3, *(display_width(shorten_name(escape_unprintable(name))) for name in classes)
        )

    def write_head(self) -> None:
        """Writes the first line of the table, the column names, to stdout."""
        cells = [pad(head, self.name_width + 7) for head in ["prediction", "then"][: self.top]]
        write_stdout("  ".join([pad("image", self.path_width), *cells]).rstrip() + "\n")

    def write_row(self, path: Path, prediction: "Prediction") -> None:
        """Writes an image's path, predicted classes and probabilities to stdout.

        Args:
            path: the path of the image.
            prediction: the most probable classes of the image.
        """
        cells = [
            f"{pad(shorten_name(escape_unprintable(name)), self.name_width)} {probability:.4f}"
            for name, probability in pairs(prediction)
        ]
        write_stdout(f"{pad(escape_unprintable(path), self.path_width)}  {'  '.join(cells)}\n")


class CsvFile:
    """A CSV file with the predicted classes, one row per image.

    The file is open during a `with` block. If the block is interrupted, the rows written so far are
    kept.

    Args:
        path: the path of the CSV file; None for no file.
        top: the number of classes per image.

    Raises:
        Failed: the file cannot be opened or written.
    """

    def __init__(self, path: Path | None, top: int):
        self.path, self.file = path, None
        names = ["prediction", "probability"]
        more = [f"{name}_{rank}" for rank in range(2, top + 1) for name in names]
        self.names = ["image", *names, *more]

    def __enter__(self) -> Self:
        if self.path is not None:
            with raising_failed(self.path):
                self.file = open(self.path, "w", encoding="utf-8", errors=BYTES, newline="")
                self.writer = csv.writer(self.file, lineterminator="\n")
                self.writer.writerow(self.names)
        return self

    def __exit__(self, *_: object) -> None:
        if self.file is not None:
            with raising_failed(self.path):
                self.file.close()

    def write_row(self, image: Path, prediction: "Prediction") -> None:
        """Writes the row of one image to the CSV file, if there is a file.

        Args:
            image: the path of the image.
            prediction: the most probable classes of the image.

        Raises:
            Failed: the file cannot be written.
        """
        if self.file is not None:
            cells = [cell for name, value in pairs(prediction) for cell in (name, f"{value:.6g}")]
            with raising_failed(self.path):
                self.writer.writerow([image, *cells])


def pairs(prediction: "Prediction") -> Iterator[tuple[str, float]]:
    """Returns an iterator over the predicted classes of an image, most probable first.

    Each item is the name of a class and the probability of the class, from 0 to 1.
    """
    return zip(prediction.classes, prediction.probabilities, strict=True)


if __name__ == "__main__":
    sys.exit(main())
