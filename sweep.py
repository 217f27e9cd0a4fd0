"""Searches for the best settings with many trials, each of which is a run of train.py.

Commands:

    python sweep.py configs/sweep.yaml                 12 trials on digits, no download
    python sweep.py configs/sweep.yaml                 in a second terminal: shares the trials
    python sweep.py configs/sweep.yaml trials=20       8 more trials, after the first 12
    python sweep.py configs/sweep.yaml name=b search=random train.epochs=20
    python sweep.py configs/sweep.yaml --skip 7        leave out trial 7
    python sweep.py configs/folds.yaml data.root=photos    cross-validation
    python sweep.py configs/folds.yaml data.root=photos --sensitivity 0.95    with thresholds

After any stop, even kill -9, the same command resumes the same trials, each from its latest
checkpoint. Needs Optuna: pip install -r requirements-sweep.txt
"""

import importlib.util
import logging
import os
import sys
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

from cnn import cli
from cnn.config import load_config
from cnn.errors import Refused
from cnn.sweeps.settings import Sweep, load_sweep

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

    from cnn.sweeps.study import Study, TakenTrial, TrialResult
    from cnn.utils.logger import Log
    from cnn.utils.signals import StopSignals

logger = logging.getLogger("cnn.sweep")

NUM_SHOWN = 5  # trials in the table at the end


class Command(cli.Command):
    """The parsed command line of sweep.py.

    Attributes:
        file: the YAML file of the sweep.
        skip: the indices of the trials to leave out.
        sensitivity, specificity: what the threshold of each fold of a cross-validation shall reach
            on the validation images. At most one is not None.
    """

    file: Path
    skip: list[int]
    sensitivity: float | None
    specificity: float | None

    @property
    def wanted(self) -> dict[str, float]:
        """What a threshold shall reach, such as {"sensitivity": 0.95}; {} for no threshold."""
        each = {"sensitivity": self.sensitivity, "specificity": self.specificity}
        return {name: value for name, value in each.items() if value is not None}


def main(argv: list[str] | None = None) -> int:
    """Runs the script, and returns the exit status.

    Args:
        argv: the arguments of the command line; None for the arguments of this process.
    """
    return cli.main(prepare, argv)


def prepare(argv: list[str]) -> cli.Task:
    """Reads the command line and the settings of the sweep.

    Args:
        argv: the arguments of the command line.

    Returns:
        The work to do.

    Raises:
        Refused: the command line or a setting is wrong, Optuna is not installed, or the system is
            Windows.
    """
    parser = cli.Parser("sweep.py", __doc__)
    add = parser.add_argument
    add("file", type=Path, metavar="FILE", help="settings of the sweep, such as configs/sweep.yaml")
    add("--skip", type=int, action="append", default=[], metavar="N", help="leave out trial N")
    either = parser.add_mutually_exclusive_group()
    for name in ("sensitivity", "specificity"):
        text = f"choose each fold's threshold of the positive class that reaches this {name} on val"
        either.add_argument(f"--{name}", type=float, metavar="X", help=text)
    parser.add_settings("of the sweep, or of all its trials")
    command = parser.parse_intermixed_args(argv, Command())
    check_packages()
    sweep = load_sweep(command.file, command.settings)
    for name, value in command.wanted.items():
        if not 0 < value < 1:
            raise Refused(f"--{name}: expected a share above 0 and below 1, got {value:g}")
        if not sweep.is_cross_validation:
            raise Refused(f"--{name}: is for a cross-validation, such as configs/folds.yaml")
    hint = "; the same command resumes"
    return cli.Task(
        lambda log, stop: run(sweep, command, log, stop), module="cnn.sweeps.study", hint=hint
    )


def check_packages() -> None:
    """Raises Refused if Optuna is not installed, or if the system is Windows.

    Windows lacks the file locks that a sweep needs.
    """
    if os.name == "nt":
        raise Refused("sweep.py needs locks that Windows has not; under WSL it works")
    if importlib.util.find_spec("optuna") is None:
        raise Refused("sweep.py needs optuna: pip install -r requirements-sweep.txt")


def run(sweep: Sweep, command: Command, log: "Log", stop: "StopSignals") -> int:
    """Trains the unfinished trials of a sweep, and then logs the best trials.

    The trials are trained one after another.

    Args:
        sweep: the settings of the sweep.
        command: the command line, which names the trials to leave out.
        log: the log of this process.
        stop: the signal handlers.

    Returns:
        The exit status: cli.FAILED if no trial of the sweep is complete, otherwise cli.DONE.
    """
    from cnn.sweeps.study import Study
    from cnn.sweeps.trial import run_trial

    stop.deferred = True  # a signal is passed on to the training process first
    with Study(sweep) as study:
        log.open_file(study.folder / "sweep.log")
        for number in command.skip:
            study.skip(number)
        log_sweep(study)
        while (trial := study.take(stop)) is not None:
            with trial:
                trial.start()
                log_trial(trial)
                result = run_trial(trial, stop)
                study.end(trial.number, result)
                log_result(trial, result)
        return log_ranking(study, command.wanted)


# -- what is logged ------------------------------------------------------------------------------


def log_sweep(study: "Study") -> None:
    """Logs the settings of a sweep and the number of finished trials."""
    from cnn.metrics.scores import mode

    sweep = study.sweep
    best = "lowest" if mode(sweep.monitor) == "min" else "highest"
    search = f"{sweep.trials} trials, {sweep.cfg.search}, for the {best} {sweep.monitor}"
    logger.info("sweep %s: %s; %d done before", sweep.name, search, num_finished(study))
    for key, dimension in sweep.space.items():
        logger.info("  %s: %s", key, dimension)


def log_trial(trial: "TakenTrial") -> None:
    """Logs that a trial starts or resumes, and logs the trial's settings."""
    from cnn.records.run_record import format_setting

    verb = "resumes" if trial.is_resumed else "starts"
    values = "  ".join(f"{key}={format_setting(value)}" for key, value in trial.values.items())
    logger.info("trial %d %s: %s  (logs/%s)", trial.number, verb, values, trial.run)


def log_result(trial: "TakenTrial", result: "TrialResult") -> None:
    """Logs how a trial ended, the number of ended trials, and the best trial."""
    study, ranking = trial.study, trial.study.ranking()
    if result.value is not None:
        text = f"{trial.monitor} {result.value:.4f} in epoch {result.epoch}"
    elif result.reason:
        text = f"failed: {result.reason}"
    else:
        text = f"stopped, in epoch {result.epoch} worse than the median"
    best = f"{ranking[0].value:.4f} of trial {ranking[0].number}" if ranking else "none yet"
    done = f"{num_finished(study)} of {study.sweep.trials} done"
    logger.info("trial %d: %s; best so far %s; %s", trial.number, text, best, done)


def num_finished(study: "Study") -> int:
    """Returns the number of trials that are complete, stopped early or failed."""
    return sum(trial.state.is_finished() for trial in study.trials())


def log_ranking(study: "Study", wanted: dict[str, float]) -> int:
    """Logs the best trials of a sweep, with commands for further work.

    One command compares the best trials. Another command trains with the settings of the best
    trial. A cross-validation ends with its figures instead, `wanted` for a threshold among them.

    Returns:
        The exit status: cli.FAILED if no trial is complete, otherwise cli.DONE.
    """
    from cnn.records.run_record import format_setting
    from cnn.utils.screen import align_columns

    monitor, ranking = study.sweep.monitor, study.ranking()
    states = Counter(trial.state.name for trial in study.trials())
    words = {"PRUNED": "stopped early", "FAIL": "failed"}
    counts = [f"{states[name]} {word}" for name, word in words.items() if states[name]]
    summary = ", ".join([f"{len(ranking)} complete", *counts])
    logger.info("sweep %s is done: %s", study.sweep.name, summary)
    if not ranking:
        logger.error("no trial is complete; their output is in %s/trials", study.folder)
        return cli.FAILED
    if study.sweep.is_cross_validation:
        return log_folds(study, wanted)
    shown = ranking[:NUM_SHOWN]
    rows = [["trial", monitor, "epoch", *study.sweep.space]]
    for trial in shown:
        values = [format_setting(trial.params.get(key)) for key in study.sweep.space]
        epoch = str(trial.user_attrs["epoch"])
        rows.append([str(trial.number), f"{trial.value:.4f}", epoch, *values])
    for line in align_columns(rows, right=(0, 1, 2)):
        logger.info("  %s", line)
    runs = [study.sweep.run_name(trial.number) for trial in shown]
    logger.info("compare: python compare.py %s", " ".join(runs))
    log_best_settings(study, ranking[0])
    return cli.DONE


def log_folds(study: "Study", wanted: dict[str, float]) -> int:
    """Logs the result of a cross-validation, and writes the predictions of all its folds.

    Returns:
        The exit status: cli.FAILED if folds are not complete, otherwise cli.DONE.
    """
    from cnn.sweeps.folds import summarize
    from cnn.utils.screen import align_columns

    number, done = study.sweep.trials, len(study.ranking())
    if done < number:
        logger.error("%d of %d folds are not complete: no figures", number - done, number)
        return cli.FAILED
    file = study.folder / "predictions_oof.csv"
    for line in align_columns(summarize(study.sweep, file, wanted)):
        logger.info("  %s", line)
    logger.info("each image's prediction by a model that was not trained on it: %s", file)
    return cli.DONE


def log_best_settings(study: "Study", best: "FrozenTrial") -> None:
    """Logs a command that trains with the settings of the best trial.

    The command names a settings file in configs/best_hparams if that file has the result of the
    trial. Otherwise, the command names config.yaml in the trial's log folder. If the log folder is
    on another machine, no command is logged, but a line says so.

    Args:
        study: the sweep.
        best: the best trial of the sweep.
    """
    from cnn.records import best_hparams
    from cnn.utils.run_folder import RunFolder

    run = study.sweep.run_name(best.number)
    folder = RunFolder(run)
    settings = folder.logs.config
    if not settings.is_file():
        logger.info("trial %d is on the machine that has the run %s", best.number, run)
        return
    cfg, _ = load_config(settings)
    path = best_hparams.file_of(cfg, folder.best_hparams)
    held = best_hparams.best_result(path)
    is_best = held == (study.sweep.monitor, best.value)
    logger.info("its settings: python train.py --config %s", path if is_best else settings)
    if held is not None and not is_best:
        logger.info("%s keeps what another run reached, %s %.4f", path, *held)


if __name__ == "__main__":
    sys.exit(main())
