"""The trials of a sweep in Optuna's database: which there are, who is at which, what came of them.

A sweep of N trials is the study's trials 0 to N-1, whatever processes there are and however they
end. A trial is taken by the lock on its file in logs/sweeps/NAME/trials/, which the run holds too,
by one that the run does not hold, and then by the database, from waiting to running. One that is
running in the database and whose locks are free was broken off: whoever takes it goes on with it, the
same number and values in the same run. What is proposed is a function of (seed, number) and of the
trials that were done before.

Machines that share a database and no disk cannot see each other's locks: there a trial goes on where
its file is.
"""

import logging
import random
import time
import uuid
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import numpy as np
import optuna
from filelock import FileLock
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial, TrialState
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

from cnn import config
from cnn.config import Config, as_text
from cnn.errors import DatabaseFailed, Refused
from cnn.metrics.scores import mode
from cnn.sweeps.locks import SharedLock
from cnn.sweeps.settings import Range, Sweep
from cnn.sweeps.trial import COMPLETE, FAILED, PRUNED, TrialResult
from cnn.utils.files import make_folder, write_text
from cnn.utils.run_folder import RunFolder
from cnn.utils.screen import align_columns
from cnn.utils.signals import StopSignals

logger = logging.getLogger(__name__)

SWEEPS = Path("logs", "sweeps")
PAUSE = 0.5  # seconds between two looks at what other processes are doing
PATIENCE = 60.0  # seconds for a database that is locked, or away
TAKING = 10.0  # seconds, far more than it takes from taking a trial to having signed for it
MAX_LEARNING = 10  # first trials that TPE draws at random; a quarter where there are few
MIN_TO_PRUNE = 4  # finished trials that a median is of, at least

T = TypeVar("T")


class TakenTrial:
    """A trial that this process has; as a context it lets go of it in the end."""

    def __init__(
        self, study: "Study", number: int, trial: optuna.Trial, lock: SharedLock, owner: SharedLock
    ):
        self.study, self.number, self.trial = study, number, trial
        self.lock, self.owner = lock, owner  # the run holds the first one too
        self.run = study.sweep.run_of(number)
        self.output = lock.path.with_suffix(".txt")
        self.again = False  # it was begun before
        self.values: dict[str, Any] = {}
        self._reported: set[int] = set()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.lock.release()
        self.owner.release()

    def begin(self) -> None:
        """Has it propose its values, and makes its run's folder ready; again where it broke off."""
        self.values = self.study.patiently(self._values)
        attributes = self.trial.user_attrs
        self._reported = set(self.study.frozen(self.number).intermediate_values)
        self.again = "run" in attributes
        if not self.again:  # from here on its run is one to resume, and not an earlier one
            with RunFolder(self.run) as folder:
                earlier = folder.archive()
            if earlier is not None:
                logger.info("an earlier run %s is moved to %s", self.run, earlier)
            self.study.patiently(lambda: self.trial.set_user_attr("run", self.run))

    def _values(self) -> dict[str, Any]:
        values = {}
        for key, dimension in self.study.sweep.space.items():
            if isinstance(dimension, Range):
                low, high, log = dimension.low, dimension.high, dimension.log
                whole = isinstance(low, int)
                suggest = self.trial.suggest_int if whole else self.trial.suggest_float
                values[key] = suggest(key, low, high, log=log)
            else:  # lists and mappings as text, since Optuna takes plain values only
                words = [_plain(value) for value in dimension.values]
                chosen = self.trial.suggest_categorical(key, words)
                values[key] = dimension.values[words.index(chosen)]
        return values

    def words(self) -> list[str]:
        """What train.py is told after `--resume`."""
        file, typed = self.study.settings_file.as_posix(), self.study.sweep.typed
        tried = [f"{key}={as_text(value)}" for key, value in self.values.items()]
        return ["--config", file, *typed, *tried, f"run={self.run}"]

    def report(self, epoch: int, value: float) -> bool:
        """Tells the database of an epoch; says whether the trial is worse than the median."""
        if epoch in self._reported:
            return False
        self.study.patiently(lambda: self.trial.report(value, epoch))
        self._reported.add(epoch)
        return self.is_hopeless()

    @property
    def epoch(self) -> int:
        """The latest epoch reported."""
        return max(self._reported, default=0)

    def is_hopeless(self) -> bool:
        """Whether, at the latest epoch reported, the trial is worse than the median of the others.

        After its last epoch there is nothing left to spare.
        """
        epochs = self.values.get("train.epochs", self.study.sweep.base.train.epochs)
        return self.epoch < epochs and self.study.patiently(self.trial.should_prune)


class Grid(optuna.samplers.BaseSampler):
    """Proposes what it is given."""

    def __init__(self, values: dict[str, Any]):
        self.values = {key: _plain(value) for key, value in values.items()}

    def infer_relative_search_space(
        self, study: optuna.Study, trial: FrozenTrial
    ) -> dict[str, BaseDistribution]:
        return {}

    def sample_relative(
        self, study: optuna.Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        return {}

    def sample_independent(
        self, study: optuna.Study, trial: FrozenTrial, param_name: str, _: BaseDistribution
    ) -> Any:
        return self.values[param_name]


class Study:
    """The study of a sweep, open.

    Raises:
        Refused: the database cannot be opened, or holds another sweep of the name.
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
            raise Refused(
                f"{error.filename or self.folder}: cannot be written: {error.strerror or error}"
            ) from None
        except NotImplementedError:
            raise Refused(f"{self.folder}: the file system has no locks") from None
        return self

    def __exit__(self, *_: object) -> None:
        self.storage.engine.dispose()

    def _open(self) -> None:
        direction = "minimize" if mode(self.sweep.monitor) == "min" else "maximize"
        after = self.sweep.cfg.prune_after_epochs
        pruner = optuna.pruners.NopPruner()
        if after is not None:
            pruner = optuna.pruners.MedianPruner(MIN_TO_PRUNE, n_warmup_steps=after)
        try:
            self.storage = self._open_database()
            self.study = optuna.create_study(
                storage=self.storage,
                study_name=self.sweep.name,
                direction=direction,
                pruner=pruner,
                load_if_exists=True,
            )
            begun_with = self.study.user_attrs.get("sweep")
        except (SQLAlchemyError, optuna.exceptions.OptunaError, ImportError, RuntimeError) as error:
            reason = str(error.__cause__ or error).strip().splitlines()[0]
            raise Refused(f"storage: the database cannot be opened: {reason}") from None
        now, defaults = definition(self.sweep), config.flat(config.to_dict(Config()))
        if begun_with is None:
            self.patiently(lambda: self.study.set_user_attr("sweep", now))
            begun_with = now
        # A key that is younger than the sweep was at what is its default.
        then = {key: as_text(defaults[key]) for key in now if key in defaults} | begun_with
        if then != now:
            raise Refused(self._of_another_sweep(then, now))
        write_text(self.settings_file, config.to_yaml(self.sweep.base))

    def _open_database(self) -> optuna.storages.RDBStorage:
        url = self.sweep.cfg.storage or f"sqlite:///{self.folder.as_posix()}/study.db"
        waiting = {"connect_args": {"timeout": PATIENCE}} if url.startswith("sqlite") else {}
        for again in (True, True, False):
            try:
                return optuna.storages.RDBStorage(url, engine_kwargs=waiting)
            except DBAPIError:  # another machine may be making the tables at this moment
                if not again:
                    raise
                time.sleep(1)
        raise AssertionError

    def _of_another_sweep(self, then: dict[str, str], now: dict[str, str]) -> str:
        keys = [key for key in now | then if then.get(key) != now.get(key)]
        rows = [("", "then", "now"), *((k, then.get(k, "-"), now.get(k, "-")) for k in keys)]
        return (
            f"{self.sweep.file}: the sweep {self.sweep.name} was begun otherwise:\n"
            + "\n".join(f"  {line}" for line in align_columns(rows))
            + "\n  its trials would not compare: begin another with name=NAME"
        )

    def patiently(self, act: Callable[[], T]) -> T:
        """What `act` gives; tried again where the database is locked or away for some seconds.

        Raises:
            DatabaseFailed: it stays so.
        """
        deadline = time.monotonic() + PATIENCE
        while True:
            try:
                return act()
            except (SQLAlchemyError, optuna.exceptions.StorageInternalError) as error:
                if time.monotonic() > deadline:
                    reason = str(error.__cause__ or error).strip().splitlines()[0]
                    raise DatabaseFailed(f"the database does not answer: {reason}") from None
                time.sleep(random.uniform(0.05, 0.5))  # not all at once again

    # -- which there are ------------------------------------------------------------------------

    def trials(self) -> list[FrozenTrial]:
        """Those of the sweep; machines that begin at one moment may add some too many, unused."""
        trials = self.patiently(lambda: self.study.get_trials(deepcopy=False))
        return [trial for trial in trials if trial.number < self.sweep.trials]

    def frozen(self, number: int) -> FrozenTrial:
        return self.trials()[number]

    def finished(self) -> list[FrozenTrial]:
        return [trial for trial in self.trials() if trial.state.is_finished()]

    def best(self) -> FrozenTrial | None:
        return next(iter(self.ranking()), None)

    def ranking(self) -> list[FrozenTrial]:
        """The complete trials, the best first; of equals the earlier one."""
        sign = 1 if mode(self.sweep.monitor) == "min" else -1
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        return sorted(complete, key=lambda trial: sign * trial.value)

    def count(self, state: TrialState) -> int:
        return sum(trial.state == state for trial in self.trials())

    # -- who is at which ------------------------------------------------------------------------

    def take(self, stop: StopSignals) -> TakenTrial | None:
        """The next trial to work on: first those that broke off; waits for those of others.

        Returns:
            None where all are finished.

        Raises:
            Stopped: a signal has come.
        """
        told = None
        while True:
            stop.check()
            trials = self.trials()
            left = [trial for trial in trials if not trial.state.is_finished()]
            for trial in sorted(left, key=lambda trial: trial.state == TrialState.WAITING):
                taken = self._try_to_take(trial, stop)
                if taken is not None:
                    return taken
            if len(trials) < self.sweep.trials:
                self._add_trial()
                continue
            if not left:
                return None
            numbers = [trial.number for trial in left]
            if told != numbers:
                told = numbers
                at = ", ".join(f"trial {number}" for number in numbers)
                logger.info("waiting for what others are at: %s", at)
            time.sleep(PAUSE)

    def _add_trial(self) -> None:
        """Adds one that waits, unless another process has."""
        with self._mutex:
            trials = self.trials()
            waiting = any(trial.state == TrialState.WAITING for trial in trials)
            if not waiting and len(trials) < self.sweep.trials:
                new = optuna.create_trial(state=TrialState.WAITING)
                self.patiently(lambda: self.study.add_trial(new))

    def _try_to_take(self, seen: FrozenTrial, stop: StopSignals) -> TakenTrial | None:
        """Takes the trial, unless a living process has it, or it is another machine's.

        Where that process is gone, its run is about to save and to end, and is waited for.
        """
        file = self.folder / "trials" / f"{seen.number:04}.lock"
        lock = SharedLock.take(file, create=seen.state == TrialState.WAITING)
        if lock is None and not file.exists():
            return None
        owner = SharedLock.take(file.with_suffix(".owner"), create=True)
        if owner is not None and lock is None:
            logger.info("waiting for the run of trial %d, broken off, to save", seen.number)
        while owner is not None and lock is None:
            stop.check()
            time.sleep(PAUSE)
            lock = SharedLock.take(file, create=False)
        if owner is None or not self.patiently(
            lambda: self._is_ours(self.frozen(seen.number), lock)
        ):
            for held in filter(None, (lock, owner)):
                held.release()
            return None
        self.study.sampler = self._sampler(seen.number)
        trial = self.patiently(lambda: optuna.Trial(self.study, seen._trial_id))
        return TakenTrial(self, seen.number, trial, lock, owner)

    def _is_ours(self, trial: FrozenTrial, lock: SharedLock) -> bool:
        """Signs for the trial, whose lock we have, with the word in the lock's file.

        Between machines the database decides, which takes a trial from waiting to running once.
        """
        word, signed, number = lock.text(), trial.user_attrs.get("taken"), trial._trial_id
        if trial.state.is_finished():
            return False
        if trial.state == TrialState.WAITING:
            if not word:
                word = uuid.uuid4().hex
                lock.write(word)
            if not self.storage.set_trial_state_values(number, TrialState.RUNNING):
                return False
        elif signed is not None:
            return signed == word
        elif not word or (datetime.now() - trial.datetime_start).total_seconds() < TAKING:
            return False  # another machine may be about to sign
        self.storage.set_trial_user_attr(number, "taken", word)
        return True

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """What proposes a trial's values: its own draw, so that no two processes draw the same."""
        cfg = self.sweep.cfg
        if cfg.search == "grid":
            return Grid(self.sweep.combination(number))
        seed = int(np.random.SeedSequence([cfg.seed, number]).generate_state(1)[0])
        if cfg.search == "random":
            return optuna.samplers.RandomSampler(seed)
        learning = min(MAX_LEARNING, -(-self.sweep.trials // 4))
        return optuna.samplers.TPESampler(n_startup_trials=learning, seed=seed)

    def skip(self, number: int) -> None:
        """Leaves a trial out, as failed.

        Raises:
            Refused: it is none that could be, or a process is at it.
        """
        trial = next((trial for trial in self.trials() if trial.number == number), None)
        if trial is None or trial.state.is_finished():
            raise Refused(f"--skip: expected a trial that is not finished, got {number}")
        file = self.folder / "trials" / f"{number:04}.lock"
        lock = SharedLock.take(file, create=True)
        if lock is None:
            raise Refused(f"--skip: trial {number} is being worked on; stop that process first")
        self.end(number, TrialResult(FAILED, reason="left out by --skip"))
        lock.release()

    # -- what came of them ----------------------------------------------------------------------

    def end(self, number: int, outcome: TrialResult) -> None:
        """Writes down what came of a trial."""
        trial = self.frozen(number)
        note = {"epoch": outcome.epoch} if outcome.epoch else {"reason": outcome.reason}
        states = {COMPLETE: TrialState.COMPLETE, PRUNED: TrialState.PRUNED}

        def write() -> None:
            for name, text in note.items():
                self.storage.set_trial_user_attr(trial._trial_id, name, text)
            state = states.get(outcome.state, TrialState.FAIL)
            if trial.state == TrialState.WAITING:  # skipped; Optuna's tell is for what has begun
                self.storage.set_trial_state_values(trial._trial_id, state)
            else:
                self.study.tell(number, outcome.value, state=state, skip_if_finished=True)

        try:
            self.patiently(write)
        except optuna.exceptions.UpdateFinishedTrialError:
            logger.warning("trial %d was ended meanwhile by another process", number)


def definition(sweep: Sweep) -> dict[str, str]:
    """What makes the trials of a sweep comparable: what is tried, how, and all settings besides."""
    settings = config.flat(config.to_dict(sweep.base))
    elsewhere = config.non_experiment_keys() | {"data.root", *sweep.space}
    return {
        "search": sweep.cfg.search,
        "seed of the search": str(sweep.cfg.seed),
        **{f"space: {key}": str(dimension) for key, dimension in sweep.space.items()},
        **{key: as_text(value) for key, value in settings.items() if key not in elsewhere},
    }


def _plain(value: Any) -> Any:
    return value if value is None or isinstance(value, (bool, int, float, str)) else as_text(value)
