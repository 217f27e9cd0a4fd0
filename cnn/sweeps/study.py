"""The trials of a sweep in an Optuna database that several processes and machines share.

A sweep of N trials consists of the trials 0 to N-1 of an Optuna study. A trial is created in the
state RUNNING, together with the id of the folder (logs/sweeps/NAME) whose processes may train it. A
file lock decides which of these processes does. A trial that is RUNNING in the database and whose
locks are free was interrupted. The process that takes it resumes it with the same number, the same
values and the same run. The proposed values are a function of the seed, of the trial's number, and
of the trials that were finished before.

A trial has two lock files in logs/sweeps/NAME/trials/. sweep.py holds the lock of NNNN.owner, and
both sweep.py and the training process hold the lock of NNNN.lock. If sweep.py is killed, another
process can take its trial over at once, and waits for the training process to save and to exit.

Machines that share the database but no disk cannot see each other's locks, so an interrupted trial
resumes only on the machine that has its run.
"""

import contextlib
import logging
import math
import random
import sys
import time
import uuid
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

import numpy as np
import optuna
from filelock import FileLock
from optuna.samplers import BaseSampler, PartialFixedSampler, RandomSampler, TPESampler
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from typing_extensions import Self

from cnn import config
from cnn.config import Config, as_text
from cnn.errors import Failed, Refused, first_line
from cnn.metrics.scores import mode
from cnn.sweeps import locks
from cnn.sweeps.settings import Choice, Range, Sweep
from cnn.utils.files import make_folder, write_text
from cnn.utils.run_folder import RunFolder
from cnn.utils.screen import align_columns
from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)

SWEEPS = Path("logs", "sweeps")
PAUSE = 0.5  # seconds between two checks of what other processes are doing
PATIENCE = 60.0  # seconds to wait for a database that is locked or cannot be reached
MAX_RANDOM = 10  # first trials that TPE draws at random, at most a quarter of all
MIN_TO_PRUNE = 4  # finished trials needed before a median is taken

T = TypeVar("T")


@dataclass(frozen=True)
class TrialResult:
    """The result of a trial.

    Attributes:
        state: COMPLETE, PRUNED or FAIL. A pruned trial was stopped early.
        value: the monitored metric in the best epoch of a complete trial; None for any other trial.
        epoch: the best epoch of a complete trial, the latest epoch of a pruned trial, or None for a
            failed trial. Epochs are counted from 1.
        reason: why a trial failed; "" for any other trial.
    """

    state: TrialState
    value: float | None = None
    epoch: int | None = None
    reason: str = ""


class TakenTrial(contextlib.AbstractContextManager):
    """A trial that this process trains.

    As a context manager, the object releases both locks at the end of the `with` block.

    Attributes:
        study: the open database of the sweep.
        number: the index of the trial in the sweep, from 0.
        trial: the trial as an object of Optuna.
        lock: the locked file whose lock this process shares with the training process.
        owner: the locked file whose lock only this process holds.
        run: the name of the trial's run.
        monitor: the name of the metric by which trials are compared, such as "val_acc".
        output: the path of the file to which the output of train.py is appended.
        is_resumed: whether an earlier process has started the trial; False before `start` is
            called.
        values: the values of the trial, by dotted key such as "optim.lr"; {} before `start` is
            called.
    """

    def __init__(self, study: "Study", trial: optuna.Trial, lock: IO[bytes], owner: IO[bytes]):
        self.study, self.number, self.trial = study, trial.number, trial
        self.lock, self.owner = lock, owner
        self.run, self.monitor = study.sweep.run_name(trial.number), study.sweep.monitor
        self.output = study.lock_file(trial.number).with_suffix(".txt")
        self.is_resumed = False
        self.values: dict[str, Any] = {}
        self._reported: set[int] = set()

    def __exit__(self, *_: object) -> None:
        self.lock.close()
        self.owner.close()

    def start(self) -> None:
        """Sets the hyperparameter values of the trial, and whether its run is resumed.

        For a new trial, Optuna proposes `values`, and `is_resumed` is False. Files of an older run
        that has the same name as the trial's run are moved to the archive. If an earlier process
        has already started the trial, the trial keeps its values and its run, and `is_resumed` is
        True.
        """
        space = self.study.sweep.space
        self.values = self.study.retry(lambda: {k: self._suggest(k, space[k]) for k in space})
        self._reported = set(self.study.frozen(self.number).intermediate_values)
        self.is_resumed = "run" in self.trial.user_attrs
        if not self.is_resumed:  # once "run" is set, the run of this name belongs to the trial
            with RunFolder(self.run) as folder:
                archived = folder.archive()
            if archived is not None:
                logger.info("an earlier run %s is moved to %s", self.run, archived)
            self.study.retry(lambda: self.trial.set_user_attr("run", self.run))

    def _suggest(self, key: str, dimension: Choice | Range) -> Any:
        if isinstance(dimension, Range):
            is_whole = isinstance(dimension.low, int)
            suggest = self.trial.suggest_int if is_whole else self.trial.suggest_float
            return suggest(key, dimension.low, dimension.high, log=dimension.log)
        options = [_as_plain(value) for value in dimension.values]
        return dimension.values[options.index(self.trial.suggest_categorical(key, options))]

    def arguments(self) -> list[str]:
        """Returns the arguments with which train.py trains this trial.

        The option --resume is not included. An example is ["--config",
        "logs/sweeps/lr/settings.yaml", "optim.lr=0.1", "run=lr_0007"].
        """
        file, typed = self.study.settings_file.as_posix(), self.study.sweep.typed
        tried = [f"{key}={as_text(value)}" for key, value in self.values.items()]
        return ["--config", file, *typed, *tried, f"run={self.run}"]

    def report(self, epoch: int, value: float) -> bool:
        """Stores the monitored metric of an epoch in the database.

        Args:
            epoch: the epoch, counted from 1.
            value: the metric after the epoch.

        Returns:
            Whether the trial should be stopped early; False if the epoch was reported before.
        """
        if epoch in self._reported:
            return False
        self.study.retry(lambda: self.trial.report(value, epoch))
        self._reported.add(epoch)
        return self.should_prune()

    @property
    def epoch(self) -> int:
        """The latest epoch whose metric was reported.

        Epochs are counted from 1. The value is 0 before the first report.
        """
        return max(self._reported, default=0)

    def should_prune(self) -> bool:
        """Returns whether the trial should be stopped early.

        The trial should be stopped if its best metric so far is worse than a median. The median is
        taken over the metrics of the complete trials at the same epoch.

        The result is always False in four cases: if the setting prune_after_epochs is null, before
        the epoch that prune_after_epochs names, while fewer than 4 trials are complete, and after
        the last epoch.
        """
        epochs = self.values.get("train.epochs", self.study.sweep.base.train.epochs)
        return self.epoch < epochs and self.study.retry(self.trial.should_prune)


class Study:
    """The database of a sweep, as a context manager.

    The database is open within the `with` block.

    Args:
        sweep: the settings of the sweep.

    Attributes:
        sweep: the settings of the sweep.
        folder: the folder of the sweep, logs/sweeps/NAME.
        settings_file: the path of the YAML file with the settings of train.py that all trials
            share.

    Raises:
        Refused: at the start of the `with` block, in three cases: the folder cannot be written, the
            database cannot be opened, or the database has a sweep of the same name with other
            settings.
    """

    def __init__(self, sweep: Sweep):
        self.sweep = sweep
        self.folder = SWEEPS / sweep.name
        self.settings_file = self.folder / "settings.yaml"
        self._mutex = FileLock(self.folder / ".lock", timeout=PATIENCE)

    def __enter__(self) -> Self:
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        try:
            make_folder(self.folder / "trials")
            with self._mutex:
                self._open()
        except OSError as error:
            where = error.filename or self.folder
            raise Refused(f"{where}: cannot be written: {error.strerror or error}") from None
        except NotImplementedError:
            raise Refused(f"{self.folder}: the file system does not support locks") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.storage.engine.dispose()

    def _open(self) -> None:
        after = self.sweep.cfg.prune_after_epochs or sys.maxsize  # null: never
        try:
            self.storage = self._open_database()
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=self.sweep.name,
                direction={"min": "minimize", "max": "maximize"}[mode(self.sweep.monitor)],
                pruner=optuna.pruners.MedianPruner(MIN_TO_PRUNE, n_warmup_steps=after),
                load_if_exists=True,
            )
            stored = self.study.user_attrs.get("sweep")
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError) as error:
            reason = first_line(error.__cause__ or error)
            raise Refused(f"storage: the database cannot be opened: {reason}") from None
        current = comparable_settings(self.sweep)
        if stored is None:
            self.retry(lambda: self.study.set_user_attr("sweep", current))
        else:
            self._check_same_sweep(stored, current)
        write_text(self.settings_file, config.to_yaml(self.sweep.base))
        id_file = self.folder / ".id"
        if not id_file.exists():
            write_text(id_file, uuid.uuid4().hex)
        self.folder_id = id_file.read_text(encoding="utf-8")

    def _open_database(self) -> optuna.storages.RDBStorage:
        url = self.sweep.cfg.storage or f"sqlite:///{self.folder.as_posix()}/study.db"
        options = {"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else {}
        for _ in range(2):  # another machine may be creating the tables at the same time
            with contextlib.suppress(DBAPIError):
                return optuna.storages.RDBStorage(url, engine_kwargs=options)
            time.sleep(1)
        return optuna.storages.RDBStorage(url, engine_kwargs=options)

    def _check_same_sweep(self, stored: dict[str, str], current: dict[str, str]) -> None:
        defaults = config.flat(config.to_dict(Config()))
        # A setting that did not exist when the sweep was started acted as its present default does.
        stored = {key: as_text(defaults[key]) for key in current if key in defaults} | stored
        keys = [key for key in current | stored if stored.get(key) != current.get(key)]
        if keys:
            rows = [(key, stored.get(key, "-"), current.get(key, "-")) for key in keys]
            table = "\n  ".join(align_columns([("", "then", "now"), *rows]))
            raise Refused(
                f"{self.sweep.file}: sweep {self.sweep.name} was started with other settings:\n"
                f"  {table}\n  its trials could not be compared; start another with name=NAME"
            )

    def retry(self, function: Callable[[], T]) -> T:
        """Calls a function, and repeats the call while the database does not answer.

        The database does not answer if it is locked or cannot be reached.

        Args:
            function: a function without arguments that uses the database.

        Returns:
            The result of the function.

        Raises:
            Failed: the call still fails after a minute.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return function()
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                if time.monotonic() > deadline:
                    reason = first_line(error.__cause__ or error)
                    raise Failed(f"the database does not answer: {reason}") from None
                time.sleep(random.uniform(0.05, 0.5))  # so that processes differ in their times

    # -- reading trials -------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Returns the trials of the sweep that exist so far.

        The trials are in the order of their indices. Machines that start at the same time can
        create too many trials. The surplus trials have the highest indices and are left out.
        """
        trials = self.retry(lambda: self.study.get_trials(deepcopy=False))
        return [trial for trial in trials if trial.number < self.sweep.trials]

    def frozen(self, number: int) -> FrozenTrial:
        """Returns a trial as stored in the database now.

        Args:
            number: the index of the trial, from 0.
        """
        return self.trials()[number]

    def ranking(self) -> list[FrozenTrial]:
        """Returns the complete trials, from the best metric to the worst.

        Trials with equal metrics are in the order of their indices.
        """
        sign = 1 if mode(self.sweep.monitor) == "min" else -1
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda trial: sign * trial.value)

    # -- taking and ending trials ---------------------------------------------------------------

    def take(self, stop: StopSignals) -> TakenTrial | None:
        """Takes a trial for this process to train.

        An interrupted trial is taken if there is one, otherwise a new trial. If other processes are
        training all unfinished trials, this method waits. The wait ends when one of these trials is
        interrupted or when all trials are finished.

        Args:
            stop: the signal handlers of this process.

        Returns:
            The trial; None when all trials are finished.

        Raises:
            Stopped: this process has received a signal.
        """
        logged: list[int] = []
        while True:
            stop.check()
            trials = self.trials()
            unfinished = [trial for trial in trials if not trial.state.is_finished()]
            for trial in unfinished:
                taken = self._try_to_take(trial, stop)
                if taken is not None:
                    return taken
            if len(trials) < self.sweep.trials:
                self._add_trial()
                continue
            if not unfinished:
                return None
            numbers = [trial.number for trial in unfinished]
            if numbers != logged:
                logged = numbers
                logger.info("waiting for other processes: trials %s", str(numbers).strip("[]"))
            time.sleep(PAUSE)

    def _add_trial(self) -> None:
        with self._mutex:
            if len(self.trials()) < self.sweep.trials:
                attributes = {"taken": self.folder_id}
                new = optuna.create_trial(state=TrialState.RUNNING, user_attrs=attributes)
                self.retry(lambda: self.study.add_trial(new))

    def _try_to_take(self, trial: FrozenTrial, stop: StopSignals) -> TakenTrial | None:
        """Takes an unfinished trial, unless another machine or another process has the trial.

        If an earlier process was killed, its training process can still be alive. In this case, the
        method waits for the training process to exit.

        Args:
            trial: the unfinished trial, as stored in the database.
            stop: the signal handlers of this process.

        Returns:
            The trial with its locks; None if the trial cannot be taken or has been finished
            meanwhile.

        Raises:
            Stopped: this process has received a signal.
        """
        file, number = self.lock_file(trial.number), trial.number
        ids = [self.folder_id]
        if file.is_file():  # earlier versions wrote an id into the lock file of each trial
            ids.append(file.read_text(encoding="utf-8"))
        taken_by, is_waiting = trial.user_attrs.get("taken"), trial.state == TrialState.WAITING
        # Trials of earlier versions may wait, or lack the id, until a process has taken them.
        if taken_by not in ids and (taken_by or not (is_waiting or file.is_file())):
            return None
        owner = locks.acquire(file.with_suffix(".owner"))
        if owner is None:
            return None
        lock = locks.acquire(file)
        if lock is None:
            logger.info("waiting for the run of trial %d, interrupted, to save", number)
        while lock is None:
            stop.check()
            time.sleep(PAUSE)
            lock = locks.acquire(file)
        if self.frozen(number).state.is_finished():
            lock.close()
            owner.close()
            return None
        if is_waiting:
            running = TrialState.RUNNING
            self.retry(lambda: self.storage.set_trial_state_values(trial._trial_id, running))
        self.study.sampler = self._sampler(number)
        taken = self.retry(lambda: optuna.Trial(self.study, trial._trial_id))
        return TakenTrial(self, taken, lock, owner)

    def lock_file(self, number: int) -> Path:
        """Returns the path of a trial's lock file.

        An example is logs/sweeps/NAME/trials/0007.lock. sweep.py and the training process of the
        trial share the lock on the file.

        Args:
            number: the index of the trial, from 0.
        """
        return self.folder / "trials" / f"{number:04}.lock"

    def _sampler(self, number: int) -> BaseSampler:
        """Returns the Optuna sampler that proposes the values of a trial.

        In a grid search, the values are given, and a list or a mapping is YAML text, such as
        "[1, 2]". In a random or TPE search, the sampler of each trial has a different seed.

        Args:
            number: the index of the trial, from 0.
        """
        cfg = self.sweep.cfg
        if cfg.search == "grid":
            combination = self.sweep.combination(number)
            values = {key: _as_plain(value) for key, value in combination.items()}
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Optuna calls it experimental
                return PartialFixedSampler(values, RandomSampler())
        seed = int(np.random.SeedSequence([cfg.seed, number]).generate_state(1)[0])
        if cfg.search == "random":
            return RandomSampler(seed)
        num_random = min(MAX_RANDOM, math.ceil(self.sweep.trials / 4))
        return TPESampler(n_startup_trials=num_random, seed=seed)

    def skip(self, number: int) -> None:
        """Marks an unfinished trial as failed, so that no process trains the trial.

        Args:
            number: the index of the trial, from 0.

        Raises:
            Refused: no unfinished trial has this index, or a process is training the trial.
        """
        trial = next((trial for trial in self.trials() if trial.number == number), None)
        if trial is None or trial.state.is_finished():
            raise Refused(f"--skip: expected a trial that is not finished, got {number}")
        lock = locks.acquire(self.lock_file(number))
        if lock is None:
            raise Refused(f"--skip: trial {number} is being trained; stop that process first")
        self.end(number, TrialResult(TrialState.FAIL, reason="left out by --skip"))
        lock.close()

    def end(self, number: int, result: TrialResult) -> None:
        """Stores the result of a trial in the database.

        If another process has already stored a result of the trial, the earlier result stays. A
        warning is logged in this case.

        Args:
            number: the index of the trial, from 0.
            result: the result to store.
        """
        name, value = ("epoch", result.epoch) if result.epoch else ("reason", result.reason)
        trial_id = self.frozen(number)._trial_id

        def write() -> None:
            self.storage.set_trial_user_attr(trial_id, name, value)
            self.study.tell(number, result.value, state=result.state, skip_if_finished=True)

        try:
            self.retry(write)
        except optuna.exceptions.UpdateFinishedTrialError:
            logger.warning("trial %d was meanwhile ended by another process", number)


def comparable_settings(sweep: Sweep) -> dict[str, str]:
    """Returns the settings of a sweep that must stay the same when the sweep is continued.

    Settings that do not affect the results, such as "device", are left out.

    Args:
        sweep: the sweep.

    Returns:
        The settings as text, by name. A setting of train.py has its dotted key as name, such as
        "optim.momentum". The values to try of a key have the name "space: KEY". The other names are
        "search" and "seed of the search".
    """
    settings = config.flat(config.to_dict(sweep.base))
    free = config.non_experiment_keys() | {"data.root", *sweep.space}
    return {
        "search": sweep.cfg.search,
        "seed of the search": str(sweep.cfg.seed),
        **{f"space: {key}": str(dimension) for key, dimension in sweep.space.items()},
        **{key: as_text(value) for key, value in settings.items() if key not in free},
    }


def _as_plain(value: Any) -> Any:
    """Returns a value in a form that Optuna can store.

    A list or a mapping becomes YAML text, such as "[1, 2]". Any other value is returned unchanged.
    """
    return value if value is None or isinstance(value, (bool, int, float, str)) else as_text(value)
