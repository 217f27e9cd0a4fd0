"""Makes of a trained model a file that runs without this project, on other machines and in other programs.

Commands:

    python export.py                                    checkpoints/best.pt2, for PyTorch
    python export.py --format onnx                      checkpoints/best.onnx, for onnxruntime and others
    python export.py --format weights                   checkpoints/best_weights.pt, for the model's code
    python export.py --checkpoint checkpoints/a/best.pth --output a.onnx

The file is loaded again and compared with the model before it is written. Classes and preprocessing
are in it.
"""

import importlib.util
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import cli
from cnn.errors import Refused
from cnn.utils.files import write_output
from cnn.utils.run_folder import EXPORTS

if TYPE_CHECKING:
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger("cnn.export")

SETTINGS = ("data.name", "data.root", "data.args")  # where images to check it on are
# Packages beyond requirements.txt.
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


class Command(cli.Command):
    format: str
    output: Path


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv)


def prepare(argv: list[str]) -> cli.Task:
    command = parse(argv)
    return cli.Task(
        lambda log, stop: export(command, log, stop), command.places, "cnn.inference.export"
    )


def parse(argv: list[str]) -> Command:
    """Reads the command line, and looks whether what it names is there.

    Raises:
        Refused: a setting or a file that cannot be, a format whose packages are not installed.
    """
    parser = cli.checkpoint_parser("export.py", __doc__)
    add = parser.add_argument
    add("--format", choices=tuple(EXPORTS), help="by default as --output ends, or torch")
    add("--output", type=Path, metavar="FILE", help="by default beside the checkpoint")
    add("settings", nargs="*", metavar="key=value", help=f"{', '.join(SETTINGS)}")
    command = parser.parse_intermixed_args(argv, Command())
    cli.check_settings(command.settings, SETTINGS)
    checkpoint, given = command.checkpoint, command.output
    by_ending = {".onnx": "onnx", ".pt": "weights", ".pth": "weights"}
    ending = given.suffix.lower() if given else None
    command.format = command.format or by_ending.get(ending, "torch")
    command.output = given or checkpoint.with_name(checkpoint.stem + EXPORTS[command.format])
    cli.check_checkpoint(checkpoint)
    cli.check_output("--output", command.output)
    if command.output.exists() and command.output.samefile(checkpoint):
        raise Refused(f"--output: {command.output} is the checkpoint itself")
    check_packages(command.format)
    return command


def check_packages(form: str) -> None:
    """Refuses a format whose packages are not installed."""
    missing = [name for name in NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            f"--format {form} needs {', '.join(missing)}: pip install -r requirements-export.txt"
        )


def export(command: Command, log: "Log", stop: "StopSignals") -> None:
    """Reads the checkpoint, makes the file, compares, and only then writes it."""
    from cnn.inference import export
    from cnn.inference.trained_model import load_trained_model

    trained = load_trained_model(command.checkpoint, [*command.settings, "device=cpu"])
    command.places.update(trained.places)
    logger.info("%s", trained)
    data, said = export.export(trained, command.format)
    logger.info("%s", said)
    write_output(command.output, data)
    logger.info("written: %s, %.1f MB", command.output, len(data) / 1e6)


if __name__ == "__main__":
    sys.exit(main())
