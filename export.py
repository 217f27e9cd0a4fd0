"""Exports a trained model to a file that other programs run without this project.

Commands:

    python export.py                                   checkpoints/best.pt2, for PyTorch
    python export.py --format onnx                     checkpoints/best.onnx, for onnxruntime
    python export.py --format onnx --opset 17          for a program that knows opset 17 at most
    python export.py --format weights                  checkpoints/best_weights.pt, for the code
    python export.py --checkpoint checkpoints/a/best.pth --output a.onnx

The exported model is loaded and compared with the original before the file is written. The file
contains the names of the classes and the preprocessing too.
"""

import importlib.util
import logging
import sys
from pathlib import Path

from cnn import cli
from cnn.errors import Refused
from cnn.utils.outputs import check_output, write_output
from cnn.utils.run_folder import EXPORTS

logger = logging.getLogger("cnn.export")

# Where to find images for the comparison.
SETTINGS = ("data.name", "data.root", "data.layout", "data.args")
# The beginning of a file of each format, and the description of the input in the file.
KINDS = {
    "torch": (rb"PK", b'"input": "images: float32 (N, '),
    "onnx": (rb"\x08", b"images: float32 (N, "),
    "weights": (rb"PK", b"pixels in 0..1 - mean) / std"),
}
# Packages beyond requirements.txt.
NEEDED = {"onnx": ("onnx", "onnxscript", "onnxruntime")}
ENDINGS = {".onnx": "onnx", ".pt": "weights", ".pth": "weights", ".pt2": "torch"}
# onnx has no conversion of a subtraction to opset 13, and onnxscript none of anything to opset 26.
OPSETS = range(14, 26)


class Command(cli.Command):
    """The parsed command line of export.py.

    Attributes:
        format: the format of the exported model, "torch", "onnx" or "weights".
        output: the file for the exported model.
        opset: the version of ONNX's operators; None for the default of torch.onnx.
    """

    format: str
    output: Path
    opset: int | None


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
    return cli.Task(lambda *_: export_checkpoint(command), command.places, "cnn.inference.export")


def parse(argv: list[str]) -> Command:
    """Reads the command line, and chooses the format and the output file by default.

    Returns:
        The command line, with all attributes set.

    Raises:
        Refused: the command line is not valid, the checkpoint does not exist, or a package for the
            format is not installed.
    """
    parser = cli.Parser("export.py", __doc__)
    parser.add_checkpoint()
    add = parser.add_argument
    add("--format", choices=tuple(EXPORTS), help="format (default: by --output, or torch)")
    add("--output", type=Path, metavar="FILE", help="file (default: beside the checkpoint)")
    opsets = f"{OPSETS[0]} to {OPSETS[-1]}"
    add("--opset", type=int, metavar="N", help=f"opset for --format onnx, {opsets}")
    parser.add_settings(", ".join(SETTINGS))
    command = parser.parse_intermixed_args(argv, Command())
    cli.check_settings(command.settings, SETTINGS)
    checkpoint, output = command.checkpoint, command.output
    of_ending = ENDINGS.get(output.suffix.lower()) if output else None
    command.format = command.format or of_ending or "torch"
    command.output = output or checkpoint.with_name(checkpoint.stem + EXPORTS[command.format])
    if command.opset is not None and command.format != "onnx":
        raise Refused(f"--opset: expected --format onnx, got --format {command.format}")
    if command.opset is not None and command.opset not in OPSETS:
        raise Refused(f"--opset: expected {opsets}, got {command.opset}")
    cli.check_checkpoint(checkpoint)
    if of_ending not in (None, command.format):
        names = " or ".join(end for end, kind in ENDINGS.items() if kind == command.format)
        kind = f"expected a name that ends with {names} for --format {command.format}"
        raise Refused(f"--output: {kind}, got {output}")
    check_output("--output", command.output, KINDS[command.format], [checkpoint])
    check_packages(command.format)
    return command


def check_packages(file_format: str) -> None:
    """Raises Refused if a package for a file format is not installed.

    Args:
        file_format: "torch", "onnx" or "weights".
    """
    names = NEEDED.get(file_format, ())
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        what = f"--format {file_format} needs {', '.join(missing)}"
        raise Refused(f"{what}: pip install -r requirements-export.txt")


def export_checkpoint(command: Command) -> None:
    """Exports the model of a checkpoint to a file.

    Before the file is written, the exported model is loaded and compared with the original model.
    Both models must compute the same logits for some images.

    Args:
        command: the command line, which names the checkpoint, the format and the output file.

    Raises:
        Refused: the checkpoint cannot be loaded, or the model cannot be exported.
        Failed: the logits of the two models differ, or the file cannot be written.
    """
    from cnn.datasets.decode import silence_pillow
    from cnn.inference.export import export_model
    from cnn.inference.trained_model import load_trained_model

    silence_pillow()
    trained = load_trained_model(command.checkpoint, [*command.settings, "device=cpu"])
    command.places.update(trained.places)
    logger.info("%s", trained)
    content, check = export_model(trained, command.format, command.opset)
    logger.info("%s", check)
    write_output(command.output, content)
    logger.info("written: %s, %.1f MB", command.output, len(content) / 1e6)


if __name__ == "__main__":
    sys.exit(main())
