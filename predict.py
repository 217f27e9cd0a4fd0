"""Predicts the classes of images with a trained model; the checkpoint holds all it needs.

Commands:

    python predict.py photo.jpg
    python predict.py new_photos                       a folder with its subfolders
    python predict.py "new_photos/**/*.png" --top 1    a pattern, in quotes
    find . -name "*.jpg" | python predict.py -         a list of files from another program
    python predict.py new_photos --csv predictions.csv
    python predict.py new_photos --cam maps            where the network looks (Grad-CAM)
    python predict.py new_photos --checkpoint checkpoints/a/best.pth device=cpu

Images that cannot be read are named and skipped; the exit status is then 1.

A list has one file or folder per line, or a zero byte after each, as `find -print0` writes it. Its
lines are names and not patterns. A list that is none is refused before any image is read.
"""

import codecs
import csv
import logging
import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import cli
from cnn.datasets.image_files import find_images
from cnn.errors import BadImage, Refused
from cnn.utils.files import raising_failed
from cnn.utils.outputs import check_output
from cnn.utils.screen import display_width, escape_unprintable, pad, shorten_name, write_stdout

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Self

    from cnn.inference.predictor import Prediction

logger = logging.getLogger("cnn.predict")

SETTINGS = ("device", "data.batch_size", "data.num_workers", "train.precision")
IS_SETTING = re.compile(r"(device|[a-z]+\.[a-z_]+)=")

# The table of --csv, whose head has two columns for each class asked for.
TABLE = (rb"image,prediction,probability(,prediction_\d+,probability_\d+)*\n", b"")
TOP = 3
LEAST_MAP = 256  # pixels of a map's side
BYTES = "surrogateescape"  # writes a file name that is not valid text as its original bytes
MAX_PATH = 60  # columns reserved for a path; a longer one shifts its line to the right

MARKS = {  # the encodings of a list that begins with a byte-order mark
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
A_LIST = "stdin: expected a list of files and folders, one per line,"
NUM_CHECKED, NUM_NAMED = 10, 3  # paths of a list: those that are looked for, those in a message


class Command(cli.Command):
    """The parsed command line of predict.py.

    Attributes:
        paths: all positional arguments as typed. The arguments are paths of images and settings
            such as "device=cpu".
        images: the image files that were found.
        missing: a message for each path without an image.
        top: the number of classes to write per image.
        csv: the CSV file for the predictions; None for no file.
        cam: the folder for pictures with class activation maps; None for no pictures.
    """

    paths: list[str]
    images: list[Path]
    missing: list[str]
    top: int
    csv: Path | None
    cam: Path | None


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
    add(
        "--cam",
        type=Path,
        metavar="FOLDER",
        help="write where the network looks (Grad-CAM)",
    )
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
        check_output("--csv", command.csv, TABLE, [command.checkpoint])
    if command.cam is not None:
        check_folder(command.cam)
    listed = read_list(sys.stdin.buffer.read()) if "-" in paths else []
    found = []
    for path in paths:
        found += find_images(listed, patterns=False) if path == "-" else find_images([path])
    command.images = [path for path, reason in found if reason is None]
    command.missing = [
        f"{escape_unprintable(path)}: {reason}" for path, reason in found if reason is not None
    ]
    if not command.images:
        raise Refused("\n".join(command.missing[:20]))
    cli.check_checkpoint(command.checkpoint)
    return command


def check_folder(folder: Path) -> None:
    """Checks that the folder of --cam does not exist yet, or is empty.

    Raises:
        Refused: there is something else.
    """
    if os.path.lexists(folder) and (not folder.is_dir() or os.listdir(folder)):
        raise Refused(f"--cam: {folder}: expected a new folder, got one with files, or a file")


def read_list(data: bytes) -> list[str]:
    """Returns the paths in a list of files and folders.

    Args:
        data: the bytes of the list. Line ends or zero bytes separate the paths. The command `find
            -print0` writes zero bytes.

    Raises:
        Refused: the list is empty, cannot be decoded, or is no list of paths. Refused is also
            raised if the list contains the root of a file system.
    """
    paths = split_list(decode_list(data))
    if not paths:
        raise Refused(f"{A_LIST} got none")
    first = paths[:NUM_CHECKED]
    if not any(map(os.path.lexists, first)):
        names = ", ".join([*(path[:60] for path in first[:NUM_NAMED]), "..."][: len(first)])
        advice = "write paths as they are, without quotes or patterns, in UTF-8"
        raise Refused(f"{A_LIST} got {names}, which do not exist; {advice}")
    for path in paths:
        # Whoever means a whole file system types the path; in a list the path is a mistake.
        if os.path.isdir(path) and is_root(path):
            fault = f"got {shorten_name(path)}, the root of a file system"
            raise Refused(f"{A_LIST} {fault}; name folders inside it")
    return paths


def is_root(folder: str) -> bool:
    """Returns whether a folder, or the folder that a link leads to, has no parent folder."""
    real = os.path.realpath(folder)
    return os.path.dirname(real) == real


def decode_list(data: bytes) -> str:
    """Decodes a list of paths in UTF-8, in UTF-16 with a byte-order mark, or of any file names.

    Args:
        data: the bytes of the list. PowerShell writes UTF-16 with a byte-order mark.

    Raises:
        Refused: the bytes are not valid in the encoding.
    """
    encoding = next((name for mark, name in MARKS.items() if data.startswith(mark)), None)
    try:
        return os.fsdecode(data) if encoding is None else data.decode(encoding)
    except UnicodeDecodeError as error:
        fault = f"got the byte {error.object[error.start]:#04x}, no character in {error.encoding}"
        raise Refused(f"{A_LIST} {fault}; save the list as UTF-8") from None


def split_list(text: str) -> list[str]:
    """Splits a list into paths at the zero bytes or, without zero bytes, at the line ends.

    Raises:
        Refused: zero bytes do not separate paths, as in UTF-16 without a byte-order mark.
    """
    if "\0" not in text:
        return [line for line in text.replace("\r", "\n").split("\n") if line.strip()]
    paths = text.removesuffix("\0").split("\0")
    for path in paths:
        # UTF-16 leaves single letters. Of these, "." and "/" exist, but the others do not.
        if (len(path) < 2 or "\n" in path) and not os.path.lexists(path):
            fault = "got zero bytes that do not end paths, as in UTF-16 or in an image"
            raise Refused(f"{A_LIST} {fault}; save the list as UTF-8")
    return paths


def predict_images(command: Command) -> int:
    """Predicts the classes of images, and writes each prediction to the screen.

    With --csv, the predictions are written to a CSV file, too. Each prediction is written at once.
    With --cam, a picture of where the network sees the predicted class is written for each image.

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
    if command.cam is not None:
        predictor.check_maps()
        with raising_failed(command.cam):
            command.cam.mkdir(parents=True, exist_ok=True)
    num_bad, top = len(command.missing), min(command.top, len(predictor.classes))
    with CsvFile(command.csv, top) as file:
        table = Table(images, predictor.classes, top)
        table.write_head()
        predictions = predictor.predict_each(images, top)
        shown = show_progress(predictions, "predicting", len(images))
        for number, (path, prediction) in enumerate(zip(images, shown, strict=True), 1):
            if isinstance(prediction, BadImage):
                num_bad += 1
                logger.error("%s", escape_unprintable(prediction))
            else:
                table.write_row(path, prediction)
                file.write_row(path, prediction)
                if command.cam is not None:
                    found = prediction.classes[0]
                    name = f"{number:05}_{path.stem}_{found}"
                    write_map(command.cam, name, predictor.look(path, found))
    if not num_bad:
        return cli.DONE
    logger.error("%d of %d could not be read", num_bad, len(images) + len(command.missing))
    return cli.FAILED


def write_map(folder: Path, name: str, picture: "Tensor") -> None:
    """Writes a picture with a map, uint8 (3, H, W), as a PNG file of at least 256 pixels a side.

    Args:
        folder: the folder of the file.
        name: the name of the file. What some file system does not take is replaced or cut off.
        picture: the picture.

    Raises:
        Failed: the file cannot be written.
    """
    from PIL import Image

    name = re.sub(r"[^\w.\-]+", "-", name).encode(errors="replace")[:200].decode(errors="ignore")
    path = folder / f"{name}.png"
    with raising_failed(path):
        image = Image.fromarray(picture.permute(1, 2, 0).numpy())
        factor = -(-LEAST_MAP // image.width)
        image.resize((factor * image.width, factor * image.height)).save(path)


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

    def __enter__(self) -> "Self":
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
