"""Says what pictures show, by a trained model; all it needs is in the checkpoint.

Commands:

    python predict.py photo.jpg
    python predict.py new_photos                        a folder, with all below it
    python predict.py "new_photos/**/*.png" --top 1     a pattern, in quotes
    find . -name "*.jpg" | python predict.py -          a list of files from another program
    python predict.py new_photos --csv predictions.csv
    python predict.py new_photos --checkpoint checkpoints/a/best.pth device=cpu

A picture that cannot be read is named and the rest goes on; the exit status is then 1.
"""

import csv
import logging
import os
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Self

from cnn import cli
from cnn.datasets.image_files import find_images
from cnn.errors import BadImage, Refused
from cnn.utils.files import raising_failed
from cnn.utils.screen import display_width, escape_unprintable, pad, shorten_name, write_stdout

if TYPE_CHECKING:
    from cnn.inference.predictor import Prediction
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger("cnn.predict")

SETTINGS = ("device", "data.batch_size", "data.num_workers", "train.precision")
IS_SETTING = re.compile(r"(device|[a-z]+\.[a-z_]+)=")

TOP = 3
BYTES = "surrogateescape"  # a file name that is no text comes out as the bytes that it is
MAX_PATH = 60  # columns of a path; a longer one pushes its line to the right


class Command(cli.Command):
    """Its positional words are settings and paths in any order.

    Attributes:
        missing: what was named and is not there, with why.
    """

    paths: list[str]
    images: list[Path]
    missing: list[str]
    top: int
    csv: Path | None


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv)


def prepare(argv: list[str]) -> cli.Task:
    command = parse(argv)
    return cli.Task(
        lambda log, stop: predict(command, log, stop), command.places, "cnn.inference.predictor"
    )


def parse(argv: list[str]) -> Command:
    """Reads the command line, and finds the pictures.

    Raises:
        Refused: there is no picture, or a setting or a file that cannot be.
    """
    parser = cli.checkpoint_parser("predict.py", __doc__)
    add = parser.add_argument
    add(
        "paths", nargs="*", metavar="PATH", help="files, folders, patterns; - reads them from stdin"
    )
    add("--top", type=int, default=TOP, metavar="K", help=f"classes of each (default {TOP})")
    add("--csv", type=Path, metavar="FILE", help="write a table")
    command = parser.parse_intermixed_args(argv, Command())
    is_setting = {
        word: bool(IS_SETTING.match(word)) and not os.path.exists(word) for word in command.paths
    }
    command.settings = [word for word in command.paths if is_setting[word]]
    paths = [word for word in command.paths if not is_setting[word]]
    if not paths:
        parser.error("expected files, folders or patterns, or - to read a list from stdin")
    if command.top < 1:
        parser.error(f"--top: expected a whole number of at least 1, got {command.top}")
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
        raise Refused("\n".join(command.missing[:20]) or "no path came from stdin")
    cli.check_checkpoint(command.checkpoint)
    return command


def read_list() -> list[str]:
    """The paths that another program gives, a line each, or as `find -print0` does."""
    data = sys.stdin.buffer.read()
    parts = data.split(b"\0") if b"\0" in data else data.splitlines()
    return [os.fsdecode(part) for part in parts if part.strip()]


def predict(command: Command, log: "Log", stop: "StopSignals") -> int:
    """Predicts every picture as it is read; gives the exit status."""
    from cnn.inference.predictor import Predictor
    from cnn.inference.trained_model import load_trained_model
    from cnn.utils.progress import show_progress

    trained = load_trained_model(command.checkpoint, command.settings)
    command.places.update(trained.places)
    logger.info("%s", trained)
    predictor, images, bad = Predictor(trained), command.images, len(command.missing)
    for line in command.missing:
        logger.error("%s", line)
    top = min(command.top, len(predictor.classes))
    with CsvFile(command.csv, top) as file:
        table = Table(images, predictor.classes, top)
        table.head()
        each = show_progress(predictor.each(images, top), "predicting", len(images))
        for path, said in zip(images, each):
            if isinstance(said, BadImage):
                bad += 1
                logger.error("%s", escape_unprintable(said))
            else:
                table.row(path, said)
                file.row(path, said)
    if not bad:
        return cli.DONE
    logger.error("%d of %d could not be read", bad, len(images) + len(command.missing))
    return cli.FAILED


class Table:
    """The predictions on the screen, line by line as they come."""

    def __init__(self, images: list[Path], classes: list[str], top: int):
        self.top = top
        self.path = min(
            max(display_width(escape_unprintable(path)) for path in [*images, "image"]), MAX_PATH
        )
        self.name = max(
            3, *(display_width(shorten_name(escape_unprintable(name))) for name in classes)
        )

    def head(self) -> None:
        cells = [pad(head, self.name + 7) for head in ["prediction", "then"][: self.top]]
        write_stdout("  ".join([pad("image", self.path), *cells]).rstrip() + "\n")

    def row(self, path: Path, said: "Prediction") -> None:
        cells = [
            f"{pad(shorten_name(escape_unprintable(name)), self.name)} {probability:.4f}"
            for name, probability in zip(said.classes, said.probabilities)
        ]
        write_stdout(f"{pad(escape_unprintable(path), self.path)}  {'  '.join(cells)}\n")


class CsvFile:
    """The predictions as a file, row by row: those so far are in it whatever happens then.

    Args:
        path: None for none.
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

    def row(self, image: Path, said: "Prediction") -> None:
        if self.file is not None:
            pairs = zip(said.classes, said.probabilities)
            cells = [cell for name, given in pairs for cell in (name, f"{given:.6g}")]
            with raising_failed(self.path):
                self.writer.writerow([image, *cells])


if __name__ == "__main__":
    sys.exit(main())
