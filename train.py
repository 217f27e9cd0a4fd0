"""Trains an image classifier.

Commands:

    python train.py                                    configs/config.yaml: digits, no download
    python train.py optim.lr=0.01 train.epochs=10      any setting changed
    python train.py --config configs/folder.yaml data.root=photos
    python train.py --resume checkpoints/best.pth      go on from a checkpoint
    python train.py --resume                           from the latest; where there is none, start
    python train.py --drill [settings]                 can this run be stopped anywhere? try it
    python train.py --find-lr [settings]               which learning rate? a range test
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

if TYPE_CHECKING:
    from collections.abc import Iterator

    from cnn.building import Run
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
    command = cli.parse(argv, __doc__)
    try:
        cfg, places = command.load_config()
        command.places.update(places)
    except Refused as refusal:
        sys.stderr.write(f"{refusal}\n")
        return cli.REFUSED
    if command.print_config:
        sys.stdout.write(to_yaml(cfg))
        return cli.DONE
    acts = {"dry_run": dry_run, "drill": drill, "find_lr": find_lr}
    act = next((act for name, act in acts.items() if getattr(command, name)), start)
    return cli.run(lambda log, stop: act(cfg, command, log, stop), command.places)


def start(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Starts a run or goes on with one, as the command says."""
    from cnn.resuming import find_resume_point
    from cnn.utils.run import RunFolder

    point = find_resume_point(command, cfg) if command.checkpoint else None  # it knows its folder
    with RunFolder((point.cfg if point else cfg).run) as folder:
        if command.resume and (point is None or point.is_outdated()):
            point = find_resume_point(command, cfg)  # now that no other run writes there
        train(point.cfg if point else cfg, folder, log, stop, point)


def train(
    cfg: Config,
    folder: "RunFolder",
    log: "Log",
    stop: "StopSignals",
    point: "ResumePoint | None" = None,
    max_batches: int | None = None,
    trace: "Trace | None" = None,
) -> None:
    """A run, from its settings to the test of its best epoch.

    Args:
        point: where to go on from; None begins.
        max_batches: of every split and epoch, for a dry run.
        trace: where to record every batch, for the drill.
    """
    from cnn import summary
    from cnn.building import build_run
    from cnn.engine import evaluate
    from cnn.records import Records
    from cnn.resuming import make_ready
    from cnn.saving import Saver
    from cnn.utils.progress import follow

    run = build_run(cfg, point, max_batches)
    state, epochs = run.state, cfg.train.epochs
    make_ready(folder, point)
    log.open_file(folder.logs / "train.log")
    summary.write(cfg, folder.logs, run, point)

    with (
        Records(cfg, folder, run) as records,
        Saver(cfg.checkpoint, state, folder, stop, run.about) as saver,
    ):
        while not state.is_finished(epochs, cfg.train.early_stop_patience):
            label = f"epoch {state.epoch + 1}/{epochs}"
            done, total = state.batch // cfg.train.accumulate, run.steps_per_epoch
            steps = train_steps(cfg, run, trace)
            for _ in follow(steps, label, total, done, cfg.log.every_seconds):
                saver.between_steps()

            model, said = state.evaluated_model(), run.outcome()
            batches = saver.interruptible(run.val_loader.batches())
            batches = trace.follow(batches, state, said) if trace else batches
            batches = follow(batches, f"{label} val", len(run.val_loader), 0, cfg.log.every_seconds)
            key = {"seed": cfg.seed, "epoch": state.epoch}
            metrics = evaluate(model, batches, run.loss, run.autocast, "val_", said, **key)
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

    state = run.state
    batches = run.train_loader.train_batches(state.epoch + 1, start=state.batch)
    return train_one_epoch(
        state,
        trace.follow(batches, state) if trace else batches,
        run.train_loader.sizes,
        run.loss,
        run.autocast,
        seed=cfg.seed,
        accumulate=cfg.train.accumulate,
        clip_grad_norm=cfg.train.clip_grad_norm,
    )


def test(cfg: Config, run: "Run", saver: "Saver") -> None:
    """Tests the best epoch, the one time that the test images are looked at."""
    from cnn.engine import evaluate

    logger.info("testing the best epoch, once")
    state = run.state
    model, said = saver.best_model(), run.outcome(of_result=True)
    batches = saver.interruptible(run.test_loader.batches())
    epoch = state.best["epoch"] if state.best else state.epoch
    key = {"seed": cfg.seed, "epoch": epoch}
    state.test = evaluate(model, batches, run.loss, run.autocast, "test_", said, **key)
    state.predictions["test"] = said.predictions()
    saver.save()


def dry_run(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Two batches of everything: train, validate, save, resume, test; in a scratch folder."""
    from cnn.resuming import ResumePoint
    from cnn.utils.run import RunFolder

    began = time.monotonic()
    with (
        tempfile.TemporaryDirectory() as scratch,
        RunFolder(None, Path(scratch), scratch=True) as folder,
    ):
        once = {"epochs": 1, "early_stop_patience": None}
        short = replaced(cfg, run=None, train=once, log={"report": False, "tensorboard": False})
        train(short, folder, log, stop, max_batches=2)
        longer = replaced(short, train={"epochs": 2})
        train(longer, folder, log, stop, ResumePoint.read(folder.last, longer), max_batches=2)
        log.close_file()  # before the folder goes
    logger.info("dry run OK: trained, saved, resumed, tested (%.1f s)", time.monotonic() - began)


def drill(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Is this a run that can be stopped at any instant? Kills it and sees."""
    if os.name == "nt":
        raise Refused("--drill needs signals that Windows has not; under WSL it works")
    from cnn.drill import hold_drill

    hold_drill(cfg, stop)


def find_lr(cfg: Config, command: cli.Command, log: "Log", stop: "StopSignals") -> None:
    """Which learning rate? Tries ever higher ones; touches nothing of the run."""
    from cnn.find_lr import range_test

    range_test(cfg)


if __name__ == "__main__":
    sys.exit(main())
