"""Trains an image classifier.

Commands:

    python train.py                                    configs/config.yaml: digits, no download
    python train.py optim.lr=0.01 train.epochs=10      any setting changed
    python train.py --config configs/folder.yaml data.root=photos
    python train.py --resume checkpoints/best.pth      go on from a checkpoint
    python train.py --resume                           from the latest; where there is none, start
    python train.py --drill [settings]                 can this run be stopped anywhere? try it
    python train.py --find-lr [settings]               which learning rate? a range test
    torchrun --nproc-per-node 2 train.py --resume      in two processes, or on two GPUs
"""

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

    from cnn.datasets.loader import Batch, Loader
    from cnn.drill.trace import Trace
    from cnn.metrics.running import EvaluationMetrics
    from cnn.training.distributed import Group
    from cnn.training.resume import Checkpoint
    from cnn.training.saver import Saver
    from cnn.training.setup import Run
    from cnn.utils.logger import Log
    from cnn.utils.run_folder import RunFolder
    from cnn.utils.signals import StopSignals

# torch is imported in the functions that use it: a typo is answered before, in a tenth of a second.

logger = logging.getLogger("train")


class Command(cli.Command):
    """What was asked for.

    Attributes:
        resume: the file after --resume; "" for the latest, None where it was not given.
    """

    resume: str | None
    dry_run: bool
    drill: bool
    find_lr: bool
    print_config: bool


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv, prefix="", several=True)


def prepare(argv: list[str]) -> cli.Task | None:
    """What the command line asks for, its settings checked."""
    command = parse(argv)
    cfg, places = command.load_config()
    command.places.update(places)
    if command.print_config:
        sys.stdout.write(to_yaml(cfg) if launch.find_launch().is_rank0 else "")
        return None
    acts = {"dry_run": dry_run, "drill": drill, "find_lr": find_lr}
    act = next((act for name, act in acts.items() if getattr(command, name)), start)
    return cli.Task(
        lambda log, stop: act(cfg, command, log, stop), command.places, "cnn.training.setup"
    )


def start(cfg: Config, command: Command, log: "Log", stop: "StopSignals") -> None:
    """Starts a run or goes on with one, as the command says."""
    from cnn.training.distributed import process_group
    from cnn.training.resume import find_checkpoint_to_resume
    from cnn.utils.run_folder import RunFolder

    def find() -> "Checkpoint | None":
        return group.first(lambda: find_checkpoint_to_resume(command, cfg))

    with process_group(stop) as group:
        point = find() if command.checkpoint else None  # it knows its folder
        with RunFolder((point.cfg if point else cfg).run, is_writer=group.is_rank0) as folder:
            if command.resume is not None and group.first(
                lambda: point is None or point.is_outdated()
            ):
                point = find()  # now that no other run writes there
            train(point.cfg if point else cfg, folder, log, stop, group, point)


def train(
    cfg: Config,
    folder: "RunFolder",
    log: "Log",
    stop: "StopSignals",
    group: "Group",
    point: "Checkpoint | None" = None,
    max_batches: int | None = None,
    trace: "Trace | None" = None,
) -> None:
    """A run, from its settings to the test of its best epoch.

    Args:
        group: the processes that train together; the first one talks and writes.
        point: where to go on from; None begins.
        max_batches: of every split and epoch, for a dry run.
        trace: where to record every batch, for the drill.
    """
    from cnn.records import summary
    from cnn.records.records import open_records
    from cnn.training.resume import prepare_folder
    from cnn.training.saver import Saver
    from cnn.training.setup import build_run

    run = group.together(lambda: build_run(cfg, point, max_batches, group))
    state = run.state
    group.first(lambda: prepare_folder(folder, point))
    log.open_file(folder.logs.log)
    if group.is_rank0:
        summary.write(folder.logs, run, point)

    with open_records(folder, run) as records, Saver(run, folder, stop) as saver:
        while not state.is_finished(cfg.train.epochs, cfg.train.early_stop_patience):
            train_epoch(run, saver, trace)
            records.write()
            summary.log_epoch(run)
            saver.seconds()  # what the records took is not the next epoch's

        if state.test is None:
            test(run, saver, trace)
        else:
            summary.log_finished(cfg, state)
        summary.log_test(state, len(run.data.test))
        records.finish()


def train_epoch(run: "Run", saver: "Saver", trace: "Trace | None") -> None:
    """The rest of the epoch that the run is in: its steps, its validation, its checkpoints."""
    from cnn.utils.progress import show_progress

    cfg, state = run.cfg, run.state
    label = f"epoch {state.epoch + 1}/{cfg.train.epochs}"
    done, total = state.batch // cfg.train.accumulate, run.steps_per_epoch
    for _ in show_progress(train_steps(run, trace), label, total, done, cfg.log.every_seconds):
        saver.between_steps()

    said = run.evaluation_metrics()
    metrics = validate(run, said, f"{label} val", trace)
    improved = state.end_epoch(metrics, cfg.checkpoint.monitor, saver.seconds(), said.predictions())
    saver.end_epoch(improved)


def train_steps(run: "Run", trace: "Trace | None") -> "Iterator[int]":
    """The optimizer steps that are left of the epoch that the run is in."""
    from cnn.training.engine import train_one_epoch

    cfg, state, loader = run.cfg, run.state, run.train_loader
    batches = loader.train_batches(state.epoch + 1, start=state.batch)
    batches = state.group.in_step(batches, len(loader) - state.batch)
    return train_one_epoch(
        state,
        trace.record(batches, state, "training", state.running_metrics) if trace else batches,
        loader.own_sizes,
        run.loss,
        run.autocast,
        seed=cfg.seed,
        accumulate=cfg.train.accumulate,
        clip_grad_norm=cfg.train.clip_grad_norm,
    )


def evaluation_batches(run: "Run", loader: "Loader") -> "Iterator[Batch]":
    """This process's batches of an evaluation; in the wait for one a signal stops the run."""
    return run.state.group.in_step(loader.batches(), loader.num_batches_per_rank())


def validate(
    run: "Run", said: "EvaluationMetrics", label: str, trace: "Trace | None"
) -> dict[str, float | None]:
    """The metrics of the epoch that is trained; what is said of each image goes into `said`."""
    from cnn.training.engine import evaluate
    from cnn.utils.progress import show_progress

    cfg, state, loader = run.cfg, run.state, run.val_loader
    batches = evaluation_batches(run, loader)
    batches = trace.record(batches, state, "validation", said) if trace else batches
    batches = show_progress(batches, label, loader.num_batches_per_rank(), 0, cfg.log.every_seconds)
    key = {"seed": cfg.seed, "epoch": state.epoch, "group": state.group}
    model = state.evaluated_model()
    return evaluate(model, batches, run.loss, run.autocast, "val_", said, **key)


def test(run: "Run", saver: "Saver", trace: "Trace | None") -> None:
    """Tests the best epoch, the one time that the test images are looked at."""
    from cnn.training.engine import evaluate
    from cnn.utils.module_state import state_preserved

    logger.info("testing the best epoch, once")
    state = run.state
    model, said = state.evaluated_model(), run.evaluation_metrics(of_result=True)
    batches = evaluation_batches(run, run.test_loader)
    batches = trace.record(batches, state, "test", said) if trace else batches
    epoch = state.best["epoch"] if state.best else state.epoch
    key = {"seed": run.cfg.seed, "epoch": epoch, "group": state.group}
    with state_preserved(model):
        saver.load_best(model)
        test = evaluate(model, batches, run.loss, run.autocast, "test_", said, **key)
    state.test, state.predictions["test"] = test, said.predictions()
    saver.save()


def dry_run(cfg: Config, command: Command, log: "Log", stop: "StopSignals") -> None:
    """Two batches of everything: train, validate, save, resume, test; in a scratch folder."""
    from cnn.training.distributed import process_group
    from cnn.training.resume import Checkpoint
    from cnn.utils.checkpoint import load_checkpoint
    from cnn.utils.run_folder import RunFolder

    began = time.monotonic()
    with (
        process_group(stop) as group,
        tempfile.TemporaryDirectory() as scratch,
        RunFolder(None, Path(scratch), scratch=True, is_writer=group.is_rank0) as folder,
    ):
        short = for_scratch(cfg, train={"epochs": 1})
        train(short, folder, log, stop, group, max_batches=2)
        longer = with_values(short, train={"epochs": 2})
        point = group.first(lambda: Checkpoint(folder.last, load_checkpoint(folder.last), longer))
        train(longer, folder, log, stop, group, point, max_batches=2)
        log.close_file()  # before the folder goes
    logger.info("dry run OK: trained, saved, resumed, tested (%.1f s)", time.monotonic() - began)


def drill(cfg: Config, command: Command, log: "Log", stop: "StopSignals") -> None:
    """Is this a run that can be stopped at any instant? Kills it and sees."""
    launch.refuse_multiple_processes("--drill")
    if os.name == "nt":
        raise Refused("--drill needs signals that Windows has not; under WSL it works")
    from cnn.drill.drill import run_drill

    run_drill(cfg, stop, train)


def find_lr(cfg: Config, command: Command, log: "Log", stop: "StopSignals") -> None:
    """Which learning rate? Tries ever higher ones; touches nothing of the run."""
    from cnn.records.find_lr import range_test

    launch.refuse_multiple_processes("--find-lr")
    range_test(cfg)


# -- the command line ------------------------------------------------------------------------------


def parse(argv: list[str]) -> Command:
    """Reads the command line; ends with exit status 2 and the usage where it cannot be."""
    parser = cli.parser("train.py", __doc__)
    add = parser.add_argument
    add("--config", type=Path, metavar="FILE", help="settings (default configs/config.yaml)")
    add("--resume", nargs="?", const="", metavar="FILE", help="go on from FILE, or the latest")
    add("--dry-run", action="store_true", help="two batches of everything, in a scratch folder")
    add("--drill", action="store_true", help="kill a short run of yours and compare every bit")
    add("--find-lr", action="store_true", help="try ever higher learning rates, suggest one")
    add("--print-config", action="store_true", help="print every setting with its meaning")
    add("settings", nargs="*", metavar="key=value", help="change a setting: optim.lr=0.01")
    command, unknown = parser.parse_known_intermixed_args(_separate(argv), Command())
    if unknown:
        parser.error(
            f"unrecognized arguments: {' '.join(unknown)}; settings are written"
            f" {_as_setting(unknown[0], argv)}"
        )
    for word in command.settings:
        if word.endswith((".yaml", ".yml")):
            parser.error(f"expected key=value, got {word!r}; settings of a file: --config {word}")
        if "=" not in word:
            parser.error(
                f"expected key=value, got {word!r} (a file goes after --config or --resume)"
            )
    modes = ("dry_run", "drill", "find_lr", "print_config")
    asked = [f"--{mode.replace('_', '-')}" for mode in modes if getattr(command, mode)]
    if command.resume is not None and asked:
        parser.error(f"{asked[0]} cannot go with --resume: it looks at settings, and at no run")
    command.checkpoint = Path(command.resume) if command.resume else None
    return command


def _separate(argv: list[str]) -> list[str]:
    """Keeps `--resume key=value` from taking the setting for a file."""
    return [
        "--resume=" if word == "--resume" and "=" in following else word
        for word, following in zip(argv, [*argv[1:], ""])
    ]


def _as_setting(option: str, argv: list[str]) -> str:
    """`--epochs 5` as `train.epochs=5`."""
    name, equals, value = option.lstrip("-").replace("-", "_").partition("=")
    if not equals:
        following = argv[argv.index(option) + 1 :][:1] if option in argv else []
        value = following[0] if following and not following[0].startswith("--") else "..."
    known = [key for key in resume_rules() if name in (key, key.rpartition(".")[2])]
    return f"{known[0]}={value}" if known else "key=value: train.epochs=5"


if __name__ == "__main__":
    sys.exit(main())
