"""Trains an image classifier.

Commands:

    python train.py                                    configs/config.yaml: digits, no download
    python train.py optim.lr=0.01 train.epochs=10      any setting changed
    python train.py --config configs/folder.yaml data.root=photos
    python train.py --resume checkpoints/best.pth      resume from a checkpoint
    python train.py --resume                           from the latest one, if there is one
    python train.py --drill                            check that this run can be stopped anywhere
    python train.py --find-lr                          suggest a learning rate by a range test
    torchrun --nproc-per-node 2 train.py --resume      in two processes, or on two GPUs
"""

import contextlib
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import cli
from cnn.config import Config, for_scratch, resume_rules, to_yaml, with_values
from cnn.errors import Refused
from cnn.utils import launch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cnn.drill.trace import Trace
    from cnn.training.distributed import Group
    from cnn.training.resume import Checkpoint
    from cnn.training.run import Run
    from cnn.training.saver import Saver
    from cnn.utils.logger import Log
    from cnn.utils.run_folder import RunFolder
    from cnn.utils.signals import StopSignals

# torch is imported in the functions that use it, so that a typo is reported before that happens.

logger = logging.getLogger("train")


class Command(cli.Command):
    """The parsed command line of train.py.

    Attributes:
        resume: the file after --resume; "" for --resume without a file; None if --resume was not
            given.
        dry_run: whether --dry-run was given.
        drill: whether --drill was given.
        find_lr: whether --find-lr was given.
        print_config: whether --print-config was given.
    """

    resume: str | None
    dry_run: bool
    drill: bool
    find_lr: bool
    print_config: bool


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit status.

    Args:
        argv: the arguments of the command line, or None for those of this process.
    """
    return cli.main(prepare, argv, distributed=True)


def prepare(argv: list[str]) -> cli.Task | None:
    """Reads the command line and checks the settings.

    With --print-config, the settings are printed, and there is nothing more to do.

    Returns:
        The work to do; None with --print-config.

    Raises:
        Refused: the command line or a setting is wrong.
    """
    command = parse(argv)
    cfg, places = command.load_config()
    command.places.update(places)
    if command.print_config:
        sys.stdout.write(to_yaml(cfg) if launch.find_launch().is_rank0 else "")
        return None

    def run(log: "Log", stop: "StopSignals") -> None:
        if command.dry_run:
            dry_run(cfg, log, stop)
        elif command.drill:
            drill(cfg, stop)
        elif command.find_lr:
            find_lr(cfg)
        else:
            start(cfg, command, log, stop)

    return cli.Task(run, command.places, "cnn.training.setup")


def start(cfg: Config, command: Command, log: "Log", stop: "StopSignals") -> None:
    """Starts a new run, or resumes an earlier one, and trains it until it is finished.

    A run is resumed if --resume was given and there is a checkpoint.

    Args:
        cfg: the settings of a new run. A resumed run has these settings if --config was given.
            Otherwise, it has the settings in its checkpoint, changed by those on the command line.
        command: the command line.
        log: the log of this process.
        stop: the signal handlers.
    """
    from cnn.training.distributed import process_group
    from cnn.training.resume import find_checkpoint_to_resume, run_name

    with process_group(stop) as group:
        name = checkpoint = None
        with group.agreement():
            if group.is_rank0:
                name = run_name(command, cfg)
        with locked_folder(group, group.broadcast(name)) as folder:
            with group.agreement():
                if group.is_rank0 and command.resume is not None:
                    checkpoint = find_checkpoint_to_resume(command, cfg)
            checkpoint = group.broadcast(checkpoint)
            train(checkpoint.cfg if checkpoint else cfg, folder, log, stop, group, checkpoint)


def train(
    cfg: Config,
    folder: "RunFolder",
    log: "Log",
    stop: "StopSignals",
    group: "Group",
    checkpoint: "Checkpoint | None" = None,
    max_batches: int | None = None,
    trace: "Trace | None" = None,
) -> None:
    """Trains a run to its end, then tests its best epoch.

    Args:
        cfg: the settings of the run.
        folder: the log folder and the checkpoint folder of the run, which rank 0 has locked.
        log: the log of this process.
        stop: the signal handlers.
        group: the processes that train together; rank 0 logs and writes files.
        checkpoint: the checkpoint from which the run resumes; None for a new run.
        max_batches: the largest number of batches per split and epoch; None if there is no limit.
        trace: writes a record of every batch, for --drill; None if no records are wanted.
    """
    from cnn.records import summary
    from cnn.records.records import open_records
    from cnn.training.resume import prepare_folder
    from cnn.training.saver import Saver
    from cnn.training.setup import build_run

    with group.agreement():
        run = build_run(cfg, folder, group, checkpoint, max_batches, trace)
    with group.agreement():
        if group.is_rank0:
            prepare_folder(folder, checkpoint)
    log.open_file(folder.logs.log)
    if group.is_rank0:
        summary.write(run, checkpoint)

    with open_records(run) as records, Saver(run, stop) as saver:
        while not run.state.is_finished(cfg.train):
            train_epoch(run, saver)
            records.write()
            summary.log_epoch(run)
            saver.lap()  # the time that records took does not count for the next epoch

        if run.state.test is None:
            test(run, saver)
        else:
            summary.log_finished(cfg, run.state)
        summary.log_test(run.state, len(run.data.test))
        records.finish()


def train_epoch(run: "Run", saver: "Saver") -> None:
    """Trains the rest of the current epoch, validates the model, and saves a checkpoint."""
    from cnn.training.engine import evaluate, train_one_epoch
    from cnn.utils.progress import show_progress

    cfg, state = run.cfg, run.state
    label, every_seconds = f"epoch {state.epoch + 1}/{cfg.train.epochs}", cfg.log.every_seconds

    steps = train_one_epoch(run, run.train_batches())
    done = state.batch // cfg.train.accumulate
    for _ in show_progress(steps, label, run.steps_per_epoch, done, every_seconds):
        saver.between_steps()

    metrics, loader = run.evaluation_metrics(), run.val_loader
    batches = run.evaluation_batches(loader, "validation", metrics)
    total = loader.num_batches_per_rank()
    batches = show_progress(batches, f"{label} val", total, 0, every_seconds)
    key = {"seed": cfg.seed, "epoch": state.epoch, "group": run.group}
    values = evaluate(state.evaluated_model(), batches, run.loss, run.autocast, metrics, **key)

    monitor, predictions = cfg.checkpoint.monitor, metrics.predictions()
    improved = state.end_epoch(values, monitor, saver.lap(), predictions)
    saver.end_epoch(improved)


def test(run: "Run", saver: "Saver") -> None:
    """Evaluates the weights of the best epoch on the test images, and saves the metrics.

    A run does this once, after its last epoch. If no epoch is the best one, the latest weights are
    tested.
    """
    from cnn.training.engine import evaluate
    from cnn.utils.module_state import state_preserved

    logger.info("testing the best epoch, once")
    state, model = run.state, run.state.evaluated_model()
    metrics = run.evaluation_metrics(of_result=True)
    batches = run.evaluation_batches(run.test_loader, "test", metrics)
    epoch = state.best["epoch"] if state.best else state.epoch
    key = {"seed": run.cfg.seed, "epoch": epoch, "group": run.group}
    with state_preserved(model):
        saver.load_best(model)
        values = evaluate(model, batches, run.loss, run.autocast, metrics, **key)
    state.test = {f"test_{name}": value for name, value in values.items()}
    state.predictions["test"] = metrics.predictions()
    saver.save()


@contextlib.contextmanager
def locked_folder(
    group: "Group", name: str | None, root: Path = Path(), *, scratch: bool = False
) -> "Iterator[RunFolder]":
    """Locks the folders of a run during a `with` block, so that no other run writes into them.

    Rank 0 holds the lock for all processes.

    Args:
        group: the processes that train together.
        name: the name of the run; None for a run without a name.
        root: the folder that contains logs/ and checkpoints/.
        scratch: whether the caller removes the folders at the end, so that nothing can resume from
            them.

    Yields:
        The log folder and the checkpoint folder of the run.

    Raises:
        Refused: another process is writing into the folders, or the folders cannot be written.
    """
    from cnn.utils.run_folder import RunFolder

    folder = RunFolder(name, root, scratch=scratch)
    with group.agreement():
        if group.is_rank0:
            folder.lock()
    try:
        yield folder
    finally:
        folder.unlock()


def dry_run(cfg: Config, log: "Log", stop: "StopSignals") -> None:
    """Tries out every part of a run in a temporary folder, with at most two batches per split.

    It trains one epoch, validates, saves and tests. Then it resumes from the checkpoint for a
    second epoch.

    Args:
        cfg: the settings of the run. Its number of epochs is ignored.
        log: the log of this process.
        stop: the signal handlers.
    """
    from cnn.training.distributed import process_group
    from cnn.training.resume import Checkpoint
    from cnn.utils.checkpoint import load_checkpoint

    started = time.monotonic()
    with (
        process_group(stop) as group,
        tempfile.TemporaryDirectory() as scratch,
        locked_folder(group, None, Path(scratch), scratch=True) as folder,
    ):
        short = for_scratch(cfg, train={"epochs": 1})
        train(short, folder, log, stop, group, max_batches=2)
        longer = with_values(short, train={"epochs": 2})
        with group.agreement():
            content = load_checkpoint(folder.last) if group.is_rank0 else None
        checkpoint = Checkpoint(folder.last, group.broadcast(content), longer)
        train(longer, folder, log, stop, group, checkpoint, max_batches=2)
        log.close_file()  # the folder of the log is removed next
    logger.info("dry run OK: trained, saved, resumed, tested (%.1f s)", time.monotonic() - started)


def drill(cfg: Config, stop: "StopSignals") -> None:
    """Checks that a run with these settings can be stopped at any point and resumed.

    In a temporary folder, a short version of the run is stopped by signals and resumed. Its result
    is compared bit by bit with the result of the same training without a stop.

    Raises:
        Refused: torchrun has started several processes, or this is Windows.
        Failed: the results differ. The message says where.
    """
    launch.refuse_multiple_processes("--drill")
    if os.name == "nt":
        raise Refused("--drill needs signals that Windows has not; under WSL it works")
    from cnn.drill.drill import run_drill

    run_drill(cfg, stop, train)


def find_lr(cfg: Config) -> None:
    """Trains for some steps with a rising learning rate, and logs a learning rate to try.

    The checkpoints and logs of earlier runs are neither read nor changed.

    Raises:
        Refused: torchrun has started several processes.
    """
    from cnn.records.find_lr import range_test

    launch.refuse_multiple_processes("--find-lr")
    range_test(cfg)


# -- the command line ------------------------------------------------------------------------------


def parse(argv: list[str]) -> Command:
    """Reads the command line.

    Raises:
        Refused: the command line is not valid.
    """
    parser = cli.Parser("train.py", __doc__)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="settings (default: configs/config.yaml)")
    add("--resume", nargs="?", const="", metavar="FILE", help="resume from FILE, or the latest")
    add("--dry-run", action="store_true", help="run two batches of everything, leave nothing")
    add("--drill", action="store_true", help="kill and resume a short run, compare every bit")
    add("--find-lr", action="store_true", help="try rising learning rates, suggest one")
    add("--print-config", action="store_true", help="print every setting with its meaning")
    parser.add_settings("any, such as optim.lr=0.01")
    command, unknown = parser.parse_known_intermixed_args(_separate(argv), Command())
    if unknown:
        found, setting = " ".join(unknown), _as_setting(unknown[0], argv)
        raise Refused(f"unrecognized arguments: {found}; settings are written {setting}")
    for word in command.settings:
        if "=" not in word:
            option = "--config" if word.endswith((".yaml", ".yml")) else "--config or --resume"
            raise Refused(f"expected key=value, got {word!r}; a file goes after {option}")
    modes = ("dry_run", "drill", "find_lr", "print_config")
    asked = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(command, mode)]
    if command.resume is not None and asked:
        raise Refused(f"{asked[0]} cannot go with --resume: it concerns settings, not a run")
    if len(asked) > 1:
        raise Refused(f"{asked[0]} cannot go with {asked[1]}: expected one of them")
    command.checkpoint = Path(command.resume) if command.resume else None
    return command


def _separate(argv: list[str]) -> list[str]:
    """Replaces `--resume` by `--resume=` where a setting such as `optim.lr=0.01` follows.

    Without this, argparse would take the setting for the file of --resume.

    Returns:
        The changed list of arguments.
    """
    return [
        "--resume=" if word == "--resume" and "=" in next_word else word
        for word, next_word in zip(argv, [*argv[1:], ""])
    ]


def _as_setting(option: str, argv: list[str]) -> str:
    """Returns the setting that the user probably meant by an unknown option.

    Args:
        option: the unknown option, such as "--epochs" or "--epochs=5".
        argv: all arguments, in which the value may follow the option.

    Returns:
        A text such as "train.epochs=5" for the arguments --epochs 5, or "train.epochs=..." if no
        value follows. If there is no setting of that name, the text explains how a setting is
        written: "key=value: train.epochs=5".
    """
    name, equals, value = option.lstrip("-").replace("-", "_").partition("=")
    if not equals:
        next_words = argv[argv.index(option) + 1 :][:1] if option in argv else []
        value = next_words[0] if next_words and not next_words[0].startswith("--") else "..."
    known = [key for key in resume_rules() if name in (key, key.rpartition(".")[2])]
    return f"{known[0]}={value}" if known else "key=value: train.epochs=5"


if __name__ == "__main__":
    sys.exit(main())
