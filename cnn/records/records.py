"""The files that a run writes besides its checkpoints.

The files are made from the state of the training, so that a resume restores the files. A failure to
write a file does not stop the training. The failure is logged, and the file is written again after
the next epoch.
"""

import importlib.util
import json
import logging
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from typing_extensions import Self

from cnn.config import Config
from cnn.errors import first_line
from cnn.records import best_hparams, figures
from cnn.records.evaluation import intervals_of, predictions_table
from cnn.records.history import write_history
from cnn.records.trackers import Sender
from cnn.training.run import Run
from cnn.utils.files import warn_unwritten, write_text

logger = logging.getLogger(__name__)

# The pause after a report is this many times the time that it took, so that reports take less than
# 1 % of a run. One more report, with its pictures, is written at the end.
REPORT_PAUSE = 100
FIRST_REPORT = 0.5  # seconds; an estimate for the first report, which imports matplotlib


class Records:
    """The writer of the files that describe a run, such as history.csv and report.html.

    The training must take place in a `with` block over this object. The start of the block writes
    all files except the report and its pictures. The end of the block writes the report and its
    pictures if an epoch is complete, and sends the rest to the trackers. An exception in the block
    does not prevent the last write.

    In a run of several processes, only the object in the process of rank 0 writes files.

    Args:
        run: the run whose files are written.
    """

    def __init__(self, run: Run):
        self.folder, self.run, self.state = run.folder, run, run.state
        self._written: dict[Path, Any] = {}  # epoch and temperature of each file's predictions
        self._next_report = time.monotonic() + REPORT_PAUSE * FIRST_REPORT
        self._tensorboard = None
        self._reasons: dict[Path | str, str] = {}  # why the last write of a record failed
        trackers = run.cfg.log.trackers if run.group.is_rank0 else []
        self._senders = [Sender(name, run, self._attempt) for name in trackers]
        log_left_out(run.cfg)

    def __enter__(self) -> Self:
        self._write_result()
        self._write_tables()
        return self

    def write(self) -> None:
        """Updates the files of the run after an epoch.

        The report takes long to write. Therefore, a report that was written a short time ago is
        kept.
        """
        self._write_tables()
        for sender in self._senders:
            sender.wake()
        if time.monotonic() >= self._next_report:
            self._write_report()

    def finish(self) -> None:
        """Updates the files of the run after the final test.

        If the result is the best so far for the model and data, the settings are saved in
        configs/best_hparams, except those of a fold.
        """
        self._write_result()
        self._write_tables()  # the report follows at the end of the block
        is_fold = self.run.cfg.data.folds is not None  # its figures are of other test images
        if self.state.best is not None and not self.folder.scratch and not is_fold:
            self._attempt("configs/best_hparams", self._update_best_hparams)

    def __exit__(self, *_: object) -> None:
        if self.state.history:
            self._write_report(last=True)
        files = [*self.folder.logs.paths(), self.folder.best] if self.run.cfg.log.artifacts else []
        for sender in self._senders:
            sender.end([file for file in files if file.is_file()])

    def _write_tables(self) -> None:
        logs, state = self.folder.logs, self.state
        self._attempt(logs.history, lambda: write_history(logs.history, state.history))
        self._write_predictions("val", logs.val_predictions)
        self._write_predictions("test", logs.test_predictions)
        if self.run.cfg.log.tensorboard and has_tensorboard():
            self._attempt("logs/tensorboard", self._write_tensorboard)

    def _write_predictions(self, split: str, path: Path) -> None:
        of = self.state.best and self.state.best["epoch"], self.state.temperature
        if split not in self.state.predictions:  # a file would be of an epoch that the state lacks
            self._attempt(path, lambda: path.unlink(missing_ok=True))
        elif of != self._written.get(path):
            text = partial(predictions_table, self.run, split)
            written = self._attempt(path, lambda: write_text(path, text()))
            self._written[path] = of if written else None
            if not written:
                self._attempt(path, lambda: path.unlink(missing_ok=True))

    def _write_tensorboard(self) -> None:
        from cnn.records.tensorboard import TensorBoard

        self._tensorboard = self._tensorboard or TensorBoard(self.run)
        self._tensorboard.append()

    def _write_result(self) -> None:
        """Writes the file result.json.

        The file contains the number of classes and the number of images in each split. The file
        also contains the best epoch and the test metrics. Before the test, the best epoch and the
        test metrics are null. A metric's 95 % interval stands beside it, as in "test_acc_95".
        """
        data, state = self.run.data, self.state
        ends = intervals_of(self.run, "test") if state.test is not None else {}
        with_ends = {f"test_{name}_95": pair for name, pair in ends.items()}
        result = {
            "classes": len(data.classes),
            "images": {split: len(images) for split, images in data.splits.items()},
            "best": state.best if state.test is not None else None,
            "test": state.test and state.test | with_ends,
        }
        text, path = json.dumps(result, indent=2) + "\n", self.folder.logs.result
        self._attempt(path, lambda: write_text(path, text))

    def _write_report(self, *, last: bool = False) -> None:
        if not self.run.cfg.log.report or not figures.is_available():
            return
        from cnn.records.report import Report

        start, report = time.monotonic(), Report(self.run)
        self._attempt(self.folder.logs.report, report.write)
        if last:
            self._attempt("curves.png and confusion_matrix.png", report.write_pictures)
        now = time.monotonic()
        self._next_report = now + REPORT_PAUSE * (now - start)

    def _update_best_hparams(self) -> None:
        state, folder = self.state, self.folder.best_hparams
        row = state.history[state.best["epoch"] - 1]
        metrics = {name: value for name, value in row.items() if name.startswith("val_")}
        path = best_hparams.update(folder, self.run.cfg, state.best, metrics, state.test)
        if path is not None:
            logger.info("the best settings yet for this model and data: %s", path)

    def _attempt(self, record: Path | str, write: Callable[[], object]) -> bool:
        """Calls a function that writes a file, and logs a failure as a warning.

        A failure is not logged if the last write of the same file failed for the same reason.

        Args:
            record: the path of the file, or a name for several files, such as "logs/tensorboard".
            write: the function to call, without arguments.

        Returns:
            True if the function succeeded, False if the function raised an exception or if another
            process writes the files.
        """
        if not self.run.group.is_rank0:
            return False
        try:
            write()
            self._reasons.pop(record, None)
            return True
        except Exception as error:  # noqa: BLE001  no record shall stop a training
            message = f"{type(error).__name__}: {first_line(error)}"
            reason = getattr(error, "strerror", None) or message
            if self._reasons.get(record) != reason:
                warn_unwritten(record, reason)
            self._reasons[record] = reason
            return False


def has_tensorboard() -> bool:
    """Returns whether tensorboard is installed, without importing tensorboard."""
    return importlib.util.find_spec("tensorboard") is not None


def log_left_out(cfg: Config) -> None:
    """Logs which files a run cannot write because a package is not installed.

    Args:
        cfg: the settings of the run, which say what files are wanted.
    """
    left_out = {}
    if cfg.log.report and not figures.is_available():
        left_out["matplotlib"] = "report.html, curves.png, confusion_matrix.png"
    if cfg.log.tensorboard and not has_tensorboard():
        left_out["tensorboard"] = "logs/tensorboard"
    if "mlflow" in cfg.log.trackers and not importlib.util.find_spec("mlflow"):
        left_out["mlflow"] = "log.trackers: mlflow"
    if left_out:
        logger.info(f"left out: {', '.join(left_out.values())} (pip install {' '.join(left_out)})")
