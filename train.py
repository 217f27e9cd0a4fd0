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
from cnn.config import Config, Refused, replaced, to_yaml
from cnn.utils import launch

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cnn.building import Run
    from cnn.datasets.loading import Batch, Loader
    from cnn.distributed import Group
    from cnn.metrics import Outcome
    from cnn.resuming import ResumePoint
    from cnn.saving import Saver
    from cnn.trace import Trace
    from cnn.utils.logger import Log
    from cnn.utils.run import RunFolder
    from cnn.utils.signals import StopSignals

# torch is imported in the functions that use it: a typo is answered before, in a tenth of a second.

logger = logging.getLogger("train")


def main(argv: list[str] | None = None) -> int:
    try:
        return obey(sys.argv[1:] if argv is None else argv)
    except KeyboardInterrupt:  # before cli.run has taken the signals over, or after
        sys.stderr.write("stopped by SIGINT\n")
        return cli.INTERRUPTED


def obey(argv: list[str]) -> int:
    """Does what the command line says; gives the exit status."""
    command, is_first = cli.parse(argv, __doc__), launch.find_launch().is_first
    try:
        cfg, places = command.load_config()
        command.places.update(places)
    except Refused as refusal:
        sys.stderr.write(f"{refusal}\n" if is_first else "")
        return cli.REFUSED
    if command.print_config:
        sys.stdout.write(to_yaml(cfg) if is_first else "")
        return cli.DONE
    acts = {"dry_run": dry_run, "drill": drill, "find_lr": find_lr}
    act = next((act for name, act in acts.items() if getattr(command, name)), start)
    return cli.run(lambda log, stop: act(cfg, command, log, stop), command.places)


def start(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Starts a run or goes on with one, as the command says."""
    from cnn.distributed import joined
    from cnn.resuming import find_resume_point
    from cnn.utils.run import RunFolder

    def find() -> "ResumePoint | None":
        return group.first(lambda: find_resume_point(command, cfg))

    with joined(stop) as group:
        point = find() if command.checkpoint else None  # it knows its folder
        with RunFolder((point.cfg if point else cfg).run, first=group.first) as folder:
            if command.resume and group.first(lambda: point is None or point.is_outdated()):
                point = find()  # now that no other run writes there
            train(point.cfg if point else cfg, folder, log, stop, group, point)


def train(
    cfg: Config,
    folder: "RunFolder",
    log: "Log",
    stop: "StopSignals",
    group: "Group",
    point: "ResumePoint | None" = None,
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
    from cnn import summary
    from cnn.building import build_run
    from cnn.records import open_records
    from cnn.resuming import make_ready
    from cnn.saving import Saver
    from cnn.utils.progress import follow

    run = group.together(lambda: build_run(cfg, point, max_batches, group))
    state, epochs = run.state, cfg.train.epochs
    group.first(lambda: make_ready(folder, point))
    log.open_file(folder.logs / "train.log")
    if group.is_first:
        summary.write(cfg, folder.logs, run, point)

    with (
        open_records(cfg, folder, run) as records,
        Saver(cfg.checkpoint, state, folder, stop, run.about) as saver,
    ):
        while not state.is_finished(epochs, cfg.train.early_stop_patience):
            label = f"epoch {state.epoch + 1}/{epochs}"
            done, total = state.batch // cfg.train.accumulate, run.steps_per_epoch
            steps = train_steps(cfg, run, trace)
            for _ in follow(steps, label, total, done, cfg.log.every_seconds):
                saver.between_steps()

            said = run.outcome()
            metrics = validate(cfg, run, saver, said, f"{label} val", trace)
            seconds, monitor = saver.seconds(), cfg.checkpoint.monitor
            improved = state.end_epoch(metrics, monitor, seconds, said.predictions())
            saver.end_epoch(improved)
            records.write()
            summary.log_epoch(state, epochs)
            saver.seconds()  # what the records took is not the next epoch's

        if state.test is None:
            test(cfg, run, saver)
        else:
            summary.log_finished(cfg, state)
        summary.log_test(state, len(run.data.test))
        records.finish()


def train_steps(cfg: Config, run: "Run", trace: "Trace | None") -> "Iterator[int]":
    """The optimizer steps that are left of the epoch that the run is in."""
    from cnn.engine import train_one_epoch

    state, loader = run.state, run.train_loader
    batches = loader.train_batches(state.epoch + 1, start=state.batch)
    batches = state.group.in_step(batches, len(loader) - state.batch)
    batches = run.heap.follow("train", batches)
    return train_one_epoch(
        state,
        trace.follow(batches, state) if trace else batches,
        loader.own_sizes,
        run.loss,
        run.autocast,
        seed=cfg.seed,
        accumulate=cfg.train.accumulate,
        clip_grad_norm=cfg.train.clip_grad_norm,
    )


def evaluation_batches(run: "Run", loader: "Loader", saver: "Saver") -> "Iterator[Batch]":
    """This process's batches of an evaluation; between two of them a signal stops the run."""
    batches = saver.group.in_step(loader.batches(), loader.num_turns())
    return saver.interruptible(run.heap.follow("evaluate", batches))


def validate(
    cfg: Config, run: "Run", saver: "Saver", said: "Outcome", label: str, trace: "Trace | None"
) -> dict[str, float | None]:
    """The metrics of the epoch that is trained; what is said of each image goes into `said`."""
    from cnn.engine import evaluate
    from cnn.utils.progress import follow

    state, loader = run.state, run.val_loader
    batches = evaluation_batches(run, loader, saver)
    batches = trace.follow(batches, state, said) if trace else batches
    batches = follow(batches, label, loader.num_turns(), 0, cfg.log.every_seconds)
    key = {"seed": cfg.seed, "epoch": state.epoch, "group": state.group}
    model = state.evaluated_model()
    return evaluate(model, batches, run.loss, run.autocast, "val_", said, **key)


def test(cfg: Config, run: "Run", saver: "Saver") -> None:
    """Tests the best epoch, the one time that the test images are looked at."""
    from cnn.engine import evaluate

    logger.info("testing the best epoch, once")
    state = run.state
    model, said = saver.best_model(), run.outcome(of_result=True)
    batches = evaluation_batches(run, run.test_loader, saver)
    epoch = state.best["epoch"] if state.best else state.epoch
    key = {"seed": cfg.seed, "epoch": epoch, "group": state.group}
    state.test = evaluate(model, batches, run.loss, run.autocast, "test_", said, **key)
    state.predictions["test"] = said.predictions()
    saver.save()


def dry_run(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Two batches of everything: train, validate, save, resume, test; in a scratch folder."""
    from cnn.distributed import joined
    from cnn.resuming import ResumePoint
    from cnn.utils.run import RunFolder

    began = time.monotonic()
    with (
        joined(stop) as group,
        tempfile.TemporaryDirectory() as scratch,
        RunFolder(None, Path(scratch), scratch=True, first=group.first) as folder,
    ):
        once = {"epochs": 1, "early_stop_patience": None}
        short = replaced(cfg, run=None, train=once, log={"report": False, "tensorboard": False})
        train(short, folder, log, stop, group, max_batches=2)
        longer = replaced(short, train={"epochs": 2})
        point = group.first(lambda: ResumePoint.read(folder.last, longer))
        train(longer, folder, log, stop, group, point, max_batches=2)
        log.close_file()  # before the folder goes
    logger.info("dry run OK: trained, saved, resumed, tested (%.1f s)", time.monotonic() - began)


def drill(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Is this a run that can be stopped at any instant? Kills it and sees."""
    launch.refuse_several("--drill")
    if os.name == "nt":
        raise Refused("--drill needs signals that Windows has not; under WSL it works")
    from cnn.drill import hold_drill

    hold_drill(cfg, stop)


def find_lr(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Which learning rate? Tries ever higher ones; touches nothing of the run."""
    from cnn.find_lr import range_test

    launch.refuse_several("--find-lr")
    range_test(cfg)


if __name__ == "__main__":
    sys.exit(main())
