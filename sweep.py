"""Searches for settings: tries many, each a run of train.py that may be stopped like any other.

Commands:

    python sweep.py configs/sweep.yaml                12 trials on digits, no download
    python sweep.py configs/sweep.yaml                in a second terminal: they share the trials
    python sweep.py configs/sweep.yaml trials=20      8 more, once they are done
    python sweep.py configs/sweep.yaml name=b search=random train.epochs=20
    python sweep.py configs/sweep.yaml --skip 7       never mind that one

Stopped in any way, even by kill -9, the same command goes on: with the same trials, each from where
it was saved. Needs Optuna: pip install -r requirements-sweep.txt
"""

import importlib.util
import logging
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import cli
from cnn.config import load_config
from cnn.errors import Refused
from cnn.sweeps.settings import Sweep, load_sweep

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from cnn.sweeps.study import Study, TakenTrial
    from cnn.sweeps.trial import TrialResult
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger("cnn.sweep")

NUM_SHOWN = 5  # trials in the table at the end


class Command(cli.Command):
    file: Path
    skip: list[int]


def main(argv: list[str] | None = None) -> int:
    return cli.main(prepare, argv)


def prepare(argv: list[str]) -> cli.Task:
    parser = cli.parser("sweep.py", __doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="what is tried, as configs/sweep.yaml")
    add("--skip", type=int, action="append", default=[], metavar="N", help="leave out trial N")
    add("settings", nargs="*", metavar="key=value", help="of the sweep, or of all its trials")
    command = parser.parse_intermixed_args(argv, Command())
    check_packages()
    sweep = load_sweep(command.file, command.settings)
    hint = "; the same command goes on"
    return cli.Task(
        lambda log, stop: run(sweep, command, log, stop), module="cnn.sweeps.study", hint=hint
    )


def check_packages() -> None:
    """Refuses where Optuna is not installed, or there are no locks that processes share."""
    if os.name == "nt":
        raise Refused("sweep.py needs locks that Windows has not; under WSL it works")
    if importlib.util.find_spec("optuna") is None:
        raise Refused("sweep.py needs optuna: pip install -r requirements-sweep.txt")


def run(sweep: Sweep, command: Command, log: "Log", stop: "StopSignals") -> int:
    """The sweep, from where it is; gives the exit status."""
    from cnn.sweeps.study import Study

    stop.deferred = True  # a signal waits until the trial has had it
    with Study(sweep) as study:
        log.open_file(study.folder / "sweep.log")
        for number in command.skip:
            study.skip(number)
        return hold_sweep(study, stop)


def hold_sweep(study: "Study", stop: "StopSignals") -> int:
    """Takes one trial after the other until all of them are finished, by whichever process."""
    say_begin(study)
    while (trial := study.take(stop)) is not None:
        with trial:
            hold_trial(trial, study, stop)
    return say_result(study)


def hold_trial(trial: "TakenTrial", study: "Study", stop: "StopSignals") -> None:
    """A trial to its end, from wherever it is."""
    from cnn.sweeps.trial import PRUNED, TrialResult, is_finished, run_trial

    trial.begin()
    say_trial(trial)
    if trial.is_hopeless() and not is_finished(trial.run):  # it was, when it broke off
        outcome = TrialResult(PRUNED, epoch=trial.epoch)
    else:
        outcome = run_trial(
            *(trial.run, trial.words(), study.sweep.monitor, trial.report),
            *(trial.lock, trial.output, stop),
        )
    study.end(trial.number, outcome)
    say_outcome(trial, study, outcome)


# -- what is said --------------------------------------------------------------------------------


def say_begin(study: "Study") -> None:
    from cnn.metrics.scores import mode

    sweep = study.sweep
    best = "lowest" if mode(sweep.monitor) == "min" else "highest"
    logger.info(
        "sweep %s: %d trials, %s, for the %s %s; %d done before",
        *(sweep.name, sweep.trials, sweep.cfg.search, best, sweep.monitor, len(study.finished())),
    )
    for key, dimension in sweep.space.items():
        logger.info("  %s: %s", key, dimension)


def say_trial(trial: "TakenTrial") -> None:
    from cnn.records.run_record import shown_setting

    logger.info(
        "trial %d %s: %s  (logs/%s)",
        *(trial.number, "goes on" if trial.again else "begins"),
        *("  ".join(f"{key}={shown_setting(v)}" for key, v in trial.values.items()), trial.run),
    )


def say_outcome(trial: "TakenTrial", study: "Study", outcome: "TrialResult") -> None:
    from cnn.sweeps.trial import PRUNED

    monitor, best = study.sweep.monitor, study.best()
    said = f"{outcome.state}: {outcome.reason}" if outcome.reason else outcome.state
    if outcome.value is not None:
        said = f"{monitor} {outcome.value:.4f} in epoch {outcome.epoch}"
    elif outcome.state == PRUNED:
        said = f"stopped, in epoch {outcome.epoch} worse than the median"
    so_far = "none yet" if best is None else f"{best.value:.4f} of trial {best.number}"
    logger.info(
        "trial %d: %s; best so far %s; %d of %d done",
        *(trial.number, said, so_far, len(study.finished()), study.sweep.trials),
    )


def say_result(study: "Study") -> int:
    """The best trials, where to look at them, and the exit status."""
    from optuna.trial import TrialState

    from cnn.records.run_record import shown_setting
    from cnn.utils.screen import align_columns

    monitor, ranking = study.sweep.monitor, study.ranking()
    counts = [f"{len(ranking)} complete"]
    for state, word in ((TrialState.PRUNED, "stopped early"), (TrialState.FAIL, "failed")):
        if number := study.count(state):
            counts.append(f"{number} {word}")
    logger.info("sweep %s is done: %s", study.sweep.name, ", ".join(counts))
    if not ranking:
        logger.error("no trial came to an end; what each said is in %s/trials", study.folder)
        return cli.FAILED
    shown = ranking[:NUM_SHOWN]
    rows = [["trial", monitor, "epoch", *study.sweep.space]]
    for trial in shown:
        values = [shown_setting(trial.params.get(key)) for key in study.sweep.space]
        epoch = str(trial.user_attrs["epoch"])
        rows.append([str(trial.number), f"{trial.value:.4f}", epoch, *values])
    for line in align_columns(rows, right=(0, 1, 2)):
        logger.info("  %s", line)
    runs = [study.sweep.run_of(trial.number) for trial in shown]
    logger.info("compare: python compare.py %s", " ".join(runs))
    say_best_settings(study, ranking[0])
    return cli.DONE


def say_best_settings(study: "Study", best: "FrozenTrial") -> None:
    """Where the settings of the best trial are, to be trained with again."""
    from cnn.records import best_hparams
    from cnn.utils.run_folder import RunFolder

    run = study.sweep.run_of(best.number)
    folder = RunFolder(run)
    settings = folder.logs.config
    if not settings.is_file():
        logger.info("trial %d is on the machine that has the run %s", best.number, run)
        return
    cfg, _ = load_config(settings)
    path = best_hparams.file_of(cfg, folder.best_hparams)
    held = best_hparams.held_in(path)
    if held == (study.sweep.monitor, best.value):
        logger.info("its settings: python train.py --config %s", path)
    else:
        logger.info("its settings: python train.py --config %s", settings)
        if held is not None:
            logger.info("%s keeps what another run reached, %s %.4f", path, *held)


if __name__ == "__main__":
    sys.exit(main())
