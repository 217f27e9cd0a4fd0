"""Trackers: the epochs of a run in MLflow, or in a store that a class of the user's writes to.

Each tracker has a thread, for which training never waits. The thread sends those epochs of the
history that the store lacks. So a resumed run goes on in the store, and an epoch that could not be
sent is sent later, or after a resume.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from cnn.config import flat, to_dict
from cnn.training.run import Run
from cnn.training.state import TIME_COLUMNS
from cnn.utils.importing import import_object

logger = logging.getLogger(__name__)

PATIENCE = 20.0  # seconds that a run waits at its end; importing MLflow takes some
MOST_PARAMS = 100  # that MLflow takes at a time


class MLflow:
    """A run in MLflow. A tracker of the user's has the same methods, and may raise any error.

    The environment variables MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME say where.
    """

    def open(self, key: str, name: str, settings: dict[str, Any]) -> int:
        """Begins a run, or finds it again, and returns the last epoch that the store has, or 0.

        Args:
            key: a text that no other run has, and that stays the same when the run is resumed.
            name: the name of the run.
            settings: the settings by dotted key.
        """
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        logging.getLogger("urllib3").setLevel(logging.ERROR)  # it warns of each new attempt
        from mlflow import MlflowClient
        from mlflow.entities import Param

        self.client = client = MlflowClient()
        experiment = os.environ.get("MLFLOW_EXPERIMENT_NAME", "Default")
        found = client.get_experiment_by_name(experiment)
        place = found.experiment_id if found else client.create_experiment(experiment)
        runs = client.search_runs([place], f"tags.started = '{key}'")
        run = runs[0] if runs else client.create_run(place, tags={"started": key}, run_name=name)
        self.id = run.info.run_id
        new = [Param(k, str(v)) for k, v in settings.items() if k not in run.data.params]
        for start in range(0, len(new), MOST_PARAMS):
            client.log_batch(self.id, params=new[start : start + MOST_PARAMS])
        client.update_run(self.id, "RUNNING")
        logger.info("mlflow: run %s in the experiment %s", self.id, experiment)
        steps = [metric.step for metric in client.get_metric_history(self.id, "val_loss")]
        return max(steps, default=0)

    def send(self, epoch: int, metrics: dict[str, float]) -> None:
        """Adds the metrics of an epoch, all of them or none."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        rows = [Metric(name, value, now, epoch) for name, value in metrics.items()]
        self.client.log_batch(self.id, rows)

    def close(self, files: list[Path], *, is_finished: bool) -> None:
        """Adds files, and says whether the run is finished."""
        for file in files:
            self.client.log_artifact(self.id, str(file))
        self.client.set_terminated(self.id, "FINISHED" if is_finished else "KILLED")


TRACKERS = {"mlflow": MLflow}


class Sender(threading.Thread):
    """A thread that sends the epochs of a run to a tracker.

    Args:
        name: an item of the setting `log.trackers`.
        run: the run.
        attempt: a function that gets a name and a function, calls the function, and logs a failure.

    Raises:
        Refused: the module of the user's tracker does not exist, or does not contain it.
    """

    def __init__(self, name: str, run: Run, attempt: Callable[..., object]):
        super().__init__(daemon=True)
        self._make = TRACKERS.get(name) or import_object(name, "log.trackers")
        self._of, self._run, self._attempt = name, run, attempt
        self._begin = run.state.epoch
        self._news, self._files, self._is_ending = threading.Event(), [], False
        self._sent: int | None = None

    def wake(self) -> None:
        """Makes the thread send what is new."""
        if self.ident is None:  # only now, when most loader processes have been forked
            self.start()
        self._news.set()

    def end(self, files: list[Path]) -> None:
        """Sends the rest and files, and waits for at most `PATIENCE` seconds."""
        self._files, self._is_ending = files, True
        self.wake()
        self.join(PATIENCE)
        if self.is_alive():
            what = "has not taken everything; --resume sends the rest"
            logger.warning("log.trackers: %s %s", self._of, what)

    def run(self) -> None:
        """Sends what is new whenever there is something, until the end."""
        is_last = False
        while not is_last:
            self._news.wait()
            self._news.clear()
            is_last = self._is_ending
            self._attempt(f"log.trackers: {self._of}", partial(self._send, is_last=is_last))

    def _send(self, *, is_last: bool) -> None:
        cfg, state = self._run.cfg, self._run.state
        if self._sent is None:
            self._tracker = self._make()
            name = cfg.run or f"{cfg.model.name} on {cfg.data.name}"
            key = self._run.metadata["started"]
            self._sent = self._tracker.open(key, name, flat(to_dict(cfg)))
            if self._sent > self._begin:
                what = f"has epoch {self._sent} already, and keeps it; run=NAME begins another run"
                logger.warning("log.trackers: %s %s", self._of, what)
        new = [(row["epoch"], row) for row in list(state.history) if row["epoch"] > self._sent]
        new += [(state.epoch, state.test)] if is_last and state.test else []
        for epoch, row in new:
            left_out = ("epoch", *TIME_COLUMNS)  # times differ between two runs of one epoch
            known = {k: v for k, v in row.items() if k not in left_out and v is not None}
            self._tracker.send(epoch, known)
            self._sent = epoch
        if is_last:
            self._tracker.close(self._files, is_finished=state.test is not None)
