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

DRY_RUN_BATCH = 8  # images per process: seconds for a ResNet at 224 pixels on two cores


class Command(cli.Command):
    """The parsed command line of train.py.

    Attributes:
        resume: the file after --resume; "" for --resume without a file; None without --resume.
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
    """Runs the script, and returns the exit status.

    Args:
        argv: the arguments of the command line; None for the arguments of this process.
    """
    return cli.main(prepare, argv, distributed=True)


def prepare(argv: list[str]) -> cli.Task | None:
    """Reads the command line, and checks the settings.

    With --print-config, the function prints the settings.

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
        weights = cfg.model.weights
        if weights and command.resume is None and not Path(weights).is_file():
            raise Refused(f"model.weights: {weights}: no such file")  # before the data are read
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
    """Starts or resumes a run, and trains until the run is finished.

    A run is resumed if --resume was given and there is a checkpoint.

    Args:
        cfg: the settings of a new run. With --config, a resumed run has the same settings. Without
            --config, a resumed run has the settings of the checkpoint, with the changes from the
            command line.
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
                name = run_name(command, cfg, resumes=command.resume is not None)
        cfg = with_values(cfg, run=group.broadcast(name))
        with locked_folder(group, cfg.run) as folder:
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
    """Trains a run to the end, and then tests the best epoch.

    Args:
        cfg: the settings of the run.
        folder: the log folder and the checkpoint folder of the run, which rank 0 has locked.
        log: the log of this process.
        stop: the signal handlers.
        group: the processes that train together. Rank 0 logs and writes files.
        checkpoint: the checkpoint to resume from; None for a new run.
        max_batches: the largest number of batches per split and epoch; None for no limit.
        trace: an object that records every batch, for --drill; None for no records.
    """
    from cnn.records import summary
    from cnn.records.records import Records
    from cnn.training.resume import prepare_folder
    from cnn.training.saver import Saver
    from cnn.training.setup import build_run

    with group.agreement():
        run = build_run(cfg, folder, group, checkpoint, max_batches, trace)
        records = Records(run)
    with group.agreement():
        if group.is_rank0:
            prepare_folder(folder, checkpoint)
    log.open_file(folder.logs.log)
    if group.is_rank0:
        summary.write(run, checkpoint)
    with records, Saver(run, stop) as saver:
        while not run.state.is_finished(cfg.train):
            train_epoch(run, saver)
            records.write()
            summary.log_epoch(run)
            saver.lap()  # the time that records took does not count for the next epoch
        if run.state.test is None:
            test(run, saver)
        else:
            summary.log_finished(cfg, run.state)
        summary.log_test(run)
        records.finish()
    summary.log_next(run)


def log_early_stop(run: "Run") -> None:
    """Logs that the run ends before its last epoch, and why."""
    cfg, best, epoch = run.cfg, run.state.best, run.state.epoch
    where = (
        f"best {best['metric']} {best['value']:.4f} in epoch {best['epoch']}" if best else "none"
    )
    reason = f"no improvement in {cfg.train.early_stop_patience} epochs ({where})"
    advice = f"train.early_stop_patience=null goes on to epoch {cfg.train.epochs}"
    logger.info("stopped early after epoch %d: %s; %s", epoch, reason, advice)


def train_epoch(run: "Run", saver: "Saver") -> None:
    """Trains the rest of the current epoch, validates the model, and saves a checkpoint."""
    from cnn.records.summary import log_pace
    from cnn.training.engine import evaluate, train_one_epoch
    from cnn.utils.progress import show_progress

    cfg, state = run.cfg, run.state
    label, every_seconds = f"epoch {state.epoch + 1}/{cfg.train.epochs}", cfg.log.every_seconds

    steps = train_one_epoch(run, run.train_batches())
    if state.epoch == cfg.optim.freeze_epochs:  # epochs before are quicker
        steps = log_pace(run, steps)
    done, steps_per_epoch = state.batch // cfg.train.accumulate, state.schedule.steps_per_epoch
    for _ in show_progress(steps, label, steps_per_epoch, done, every_seconds):
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
    """Evaluates the weights of the best epoch on the test images.

    First, the temperature is fitted to the validation images. The metrics are saved in a
    checkpoint. A run is tested once, after the last epoch. If there is no best epoch, the latest
    weights are tested.
    """
    from cnn.metrics.calibration import fit_temperature
    from cnn.training.engine import evaluate
    from cnn.utils.module_state import state_preserved

    if run.state.epoch < run.cfg.train.epochs:
        log_early_stop(run)
    if (saved := run.state.predictions.get("val")) and "probabilities" in saved:
        val, given = run.data.val, saved["probabilities"].numpy()
        if len(given) == len(val):
            run.state.temperature = fit_temperature(val.labels, given, val.group_names)
            saver.save_temperature()
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
    """Locks the folders of a run during a `with` block.

    No other run can then write into the folders. Rank 0 holds the lock for all processes.

    Args:
        group: the processes that train together.
        name: the name of the run; None for a run without a name.
        root: the folder that contains logs/ and checkpoints/.
        scratch: whether the caller removes the folders at the end. If so, the run cannot be resumed
            later.

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
    """Tries out every part of a run in a temporary folder.

    The dry run trains one epoch, validates, saves and tests. Then the dry run resumes from the
    checkpoint for a second epoch. There are at most two batches per split and epoch. On a CPU,
    which would need minutes for large images, a batch has at most 8 images per process.

    Args:
        cfg: the settings of the run. The number of epochs is ignored.
        log: the log of this process.
        stop: the signal handlers.
    """
    from cnn.training.distributed import process_group
    from cnn.training.resume import Checkpoint
    from cnn.utils.checkpoint import load_checkpoint
    from cnn.utils.environment import choose_device

    started = time.monotonic()
    with (
        process_group(stop) as group,
        tempfile.TemporaryDirectory() as scratch,
        locked_folder(group, None, Path(scratch), scratch=True) as folder,
    ):
        is_cpu = choose_device(cfg.device, group.launch).type == "cpu"
        most = DRY_RUN_BATCH * group.size if is_cpu else cfg.data.batch_size
        batch_size = min(cfg.data.batch_size, most)
        short = for_scratch(cfg, train={"epochs": 1}, data={"batch_size": batch_size})
        train(short, folder, log, stop, group, max_batches=2)
        longer = with_values(short, train={"epochs": 2})
        with group.agreement():
            content = load_checkpoint(folder.last) if group.is_rank0 else None
        checkpoint = Checkpoint(folder.last, group.broadcast(content), longer)
        train(longer, folder, log, stop, group, checkpoint, max_batches=2)
        log.close_file()  # the folder of the log is removed next
    seconds, images = time.monotonic() - started, f"at most {2 * batch_size} images per split"
    logger.info(
        f"dry run OK: trained, saved, resumed, tested ({seconds:.1f} s); with {images}, the"
        f" accuracies above mean nothing"
    )


def drill(cfg: Config, stop: "StopSignals") -> None:
    """Checks that a run with the given settings can be stopped anywhere and resumed.

    In a temporary folder, a short run is stopped by signals and resumed. The result is compared bit
    by bit with the result of a run without a stop.

    Args:
        cfg: the settings of the run.
        stop: the signal handlers.

    Raises:
        Refused: torchrun has started several processes, or the system is Windows.
        Failed: the results differ. The message names the place of the difference.
    """
    launch.refuse_multiple_processes("--drill")
    if os.name == "nt":
        raise Refused("--drill needs signals that Windows has not; under WSL it works")
    from cnn.drill.drill import run_drill

    run_drill(cfg, stop, train)


def find_lr(cfg: Config) -> None:
    """Suggests a learning rate after some training steps with a rising learning rate.

    Checkpoints and logs of earlier runs are neither read nor changed.

    Args:
        cfg: the settings of the training.

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
    """Replaces `--resume` by `--resume=` before a setting such as `optim.lr=0.01`.

    Otherwise, argparse would take the setting for the file of --resume.

    Args:
        argv: the arguments of the command line.

    Returns:
        The changed list of arguments.
    """
    return [
        "--resume=" if word == "--resume" and "=" in next_word else word
        for word, next_word in zip(argv, [*argv[1:], ""])
    ]


def _as_setting(option: str, argv: list[str]) -> str:
    """Returns the setting that a user probably meant by an unknown option.

    Args:
        option: the unknown option, such as "--epochs" or "--epochs=5".
        argv: all arguments of the command line. The value can follow the option.

    Returns:
        A text such as "train.epochs=5" for the arguments --epochs 5. Without a value, the text is
        "train.epochs=...". If no setting has the name of the option, the text is "key=value:
        train.epochs=5".
    """
    name, equals, value = option.lstrip("-").replace("-", "_").partition("=")
    if not equals:
        next_words = argv[argv.index(option) + 1 :][:1] if option in argv else []
        value = next_words[0] if next_words and not next_words[0].startswith("--") else "..."
    known = [key for key in resume_rules() if name in (key, key.rpartition(".")[2])]
    return f"{known[0]}={value}" if known else "key=value: train.epochs=5"


if __name__ == "__main__":
    sys.exit(main())
