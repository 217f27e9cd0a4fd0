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
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import arguments, cli
from cnn.config import Refused
from cnn.utils.files import write_atomically

if TYPE_CHECKING:
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger("cnn.export")

SETTINGS = ("data.name", "data.root", "data.args")  # where images to check it on are
ENDINGS = {"torch": ".pt2", "onnx": ".onnx", "weights": "_weights.pt"}
# Packages beyond requirements.txt.
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}


@dataclass(frozen=True)
class Command:
    checkpoint: Path
    form: str
    output: Path
    settings: list[str]
    places: dict[str, str] = field(default_factory=dict)  # where each setting was given


def main(argv: list[str] | None = None) -> int:
    words = sys.argv[1:] if argv is None else argv
    return arguments.guarded(lambda: obey(words))


def obey(argv: list[str]) -> int:
    command = parse(argv)
    return cli.run(lambda log, stop: export(command, log, stop), command.places)


def parse(argv: list[str]) -> Command:
    """Reads the command line, and looks whether what it names is there.

    Raises:
        Refused: a setting or a file that cannot be, a format whose packages are not installed.
    """
    parser = arguments.parser("export.py", __doc__)
    add = parser.add_argument
    add("--format", choices=tuple(ENDINGS), help="by default as --output ends, or torch")
    add("--output", type=Path, metavar="FILE", help="by default beside the checkpoint")
    add("settings", nargs="*", metavar="key=value", help=f"{', '.join(SETTINGS)}")
    args = parser.parse_intermixed_args(argv)
    arguments.check_settings(args.settings, SETTINGS)
    ending = args.output.suffix.lower() if args.output else None
    by_ending = {".onnx": "onnx", ".pt": "weights", ".pth": "weights"}
    form = args.format or by_ending.get(ending, "torch")
    output = args.output or args.checkpoint.with_name(args.checkpoint.stem + ENDINGS[form])
    arguments.check_checkpoint(args.checkpoint)
    arguments.check_output("--output", output)
    if output.exists() and output.samefile(args.checkpoint):
        raise Refused(f"--output: {output} is the checkpoint itself")
    check_packages(form)
    return Command(args.checkpoint, form, output, args.settings)


def check_packages(form: str) -> None:
    """Refuses a format whose packages are not installed."""
    missing = [name for name in NEEDED.get(form, ()) if importlib.util.find_spec(name) is None]
    if missing:
        raise Refused(
            f"--format {form} needs {', '.join(missing)}: pip install -r requirements-export.txt"
        )


def export(command: Command, log: "Log", stop: "StopSignals") -> None:
    """Reads the checkpoint, makes the file, compares, and only then writes it."""
    from cnn import exporting
    from cnn.saving import Failed
    from cnn.trained import load_trained

    trained = load_trained(command.checkpoint, [*command.settings, "device=cpu"])
    command.places.update(trained.places)
    logger.info("%s", trained)
    data, said = exporting.export(trained, command.form)
    logger.info("%s", said)
    try:
        write_atomically(command.output, lambda file: file.write(data))
    except OSError as error:
        raise Failed(f"{command.output}: cannot be written: {error.strerror or error}") from None
    logger.info("written: %s, %.1f MB", command.output, len(data) / 1e6)


if __name__ == "__main__":
    sys.exit(main())
