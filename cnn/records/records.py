"""What a run leaves to be looked at, all of it made from the state: so a resume brings it back.

None of these can stop a training: what cannot be written is told, and tried again the next time.
"""

import csv
import importlib.util
import io
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

from cnn.config import Config
from cnn.metrics.scores import Metrics
from cnn.records import best_hparams, figures
from cnn.records.history import write_history
from cnn.training.setup import Run
from cnn.utils.files import warn_unwritten, write_text

logger = logging.getLogger(__name__)

# A report is written again only after this many times the time that the one before took, so that
# they take less than 1 % of a run; and, with its pictures, at the end.
REPORT_PAUSE = 100
FIRST_REPORT = 0.5  # seconds; a guess at the first one, which loads matplotlib


class Records:
    """history.csv, result.json, predictions_val.csv, report.html with its figures, TensorBoard.

    As a context it brings back, at the start, what an earlier process has left, and writes the last
    report at the end, however that comes.
    """

    def __init__(self, run: Run):
        cfg = run.cfg
        self.folder, self.run, self.state = run.folder, run, run.state
        self._predictions_of: int | None = None  # the epoch whose predictions are in the file
        self._report_at, self._report_took = time.monotonic(), FIRST_REPORT
        self._report = self._tensorboard = None
        self._told: dict[Path | str, str] = {}  # why what could not be written the last time
        say_what_is_left_out(cfg)
        if cfg.log.report and figures.is_available():
            from cnn.records.report import Report

            self._report = Report(run)
        if cfg.log.tensorboard and has_tensorboard():
            self._attempt("logs/tensorboard", self._open_tensorboard)

    def _open_tensorboard(self) -> None:
        from cnn.records.tensorboard import TensorBoard

        self._tensorboard = TensorBoard(self.run)

    def __enter__(self) -> Self:
        self._write_result()
        self._write_tables()
        if self._tensorboard is not None:
            self._attempt("logs/tensorboard", self._tensorboard.rewind)
        return self

    def write(self) -> None:
        """After every epoch."""
        self._write_tables()
        if self._tensorboard is not None:
            self._attempt("logs/tensorboard", self._tensorboard.append)
        if time.monotonic() - self._report_at >= REPORT_PAUSE * self._report_took:
            self._write_report(last=False)

    def finish(self) -> None:
        """After the test."""
        self._write_result()
        self.write()
        state = self.state
        if state.best is not None and not self.folder.scratch:
            row = state.history[state.best["epoch"] - 1]
            metrics = {name: value for name, value in row.items() if name.startswith("val_")}
            self._attempt("configs/best_hparams", lambda: self._update_best_hparams(metrics))

    def __exit__(self, *_: object) -> None:
        if self.state.history:
            self._write_report(last=True)

    def _write_tables(self) -> None:
        logs, state = self.folder.logs, self.state
        self._attempt(logs.history, lambda: write_history(logs.history, state.history))
        path, best = logs.val_predictions, state.best and state.best["epoch"]
        if "val" not in state.predictions:
            # What is there is of an epoch that this state does not know.
            self._attempt(path, lambda: path.unlink(missing_ok=True))
        elif best != self._predictions_of:
            written = self._attempt(path, lambda: write_text(path, self._predictions()))
            self._predictions_of = best if written else None

    def _write_result(self) -> None:
        """result.json: of how many images the figures are, and once there is one, the result."""
        data, state = self.run.data, self.state
        result = {
            "classes": len(data.classes),
            "images": {part: len(getattr(data, part)) for part in ("train", "val", "test")},
            "best": state.best if state.test is not None else None,
            "test": state.test,
        }
        text, path = json.dumps(result, indent=2) + "\n", self.folder.logs.result
        self._attempt(path, lambda: write_text(path, text))

    def _predictions(self) -> str:
        """predictions_val.csv: what the best epoch said of each validation image."""
        images, classes = self.run.data.val, self.run.data.classes
        said = self.state.predictions["val"]
        if len(said["prediction"]) != len(images):  # then nobody knows which are whose
            raise ValueError("some images were left out of the validation (data.on_bad_image=skip)")
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["image", "label", "prediction", "probability"])
        given = zip(said["prediction"].tolist(), said["probability"].tolist())
        for number, (label, (prediction, probability)) in enumerate(zip(images.labels, given)):
            words = (images.name(number), classes[label], classes[prediction])
            writer.writerow([*words, f"{probability:.6g}"])
        return text.getvalue()

    def _write_report(self, *, last: bool) -> None:
        if self._report is None:
            return
        began = time.monotonic()
        self._attempt(self.folder.logs.report, self._report.write)
        if last:
            self._attempt("curves.png and confusion_matrix.png", self._report.write_pictures)
        self._report_at = time.monotonic()
        self._report_took = self._report_at - began

    def _update_best_hparams(self, metrics: Metrics) -> None:
        state, folder = self.state, self.folder.best_hparams
        path = best_hparams.update(folder, self.run.cfg, state.best, metrics, state.test)
        if path is not None:
            logger.info("the best settings yet for this model and data: %s", path)

    def _attempt(self, what: Path | str, act: Callable[[], object]) -> bool:
        """Whether it succeeds; where it does not, tells why, and the same again only after it has."""
        try:
            act()
            self._told.pop(what, None)
            return True
        except Exception as error:  # noqa: BLE001  nothing of this is worth a training
            words = str(error).strip().splitlines() or [""]
            reason = getattr(error, "strerror", None) or f"{type(error).__name__}: {words[0]}"
            if self._told.get(what) != reason:
                warn_unwritten(what, reason)
            self._told[what] = reason
            return False


class Unrecorded:
    """Of a process that is not the first of its run: it leaves nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def write(self) -> None:
        pass

    def finish(self) -> None:
        pass


def open_records(run: Run) -> Records | Unrecorded:
    """The records of a run, which its first process writes."""
    return Records(run) if run.group.is_rank0 else Unrecorded()


def has_tensorboard() -> bool:
    return importlib.util.find_spec("tensorboard") is not None


def say_what_is_left_out(cfg: Config) -> None:
    """One line, where something asked for needs a package that is not installed."""
    left_out = {}
    if (cfg.log.report or cfg.log.tensorboard) and not figures.is_available():
        of_report = "report.html, curves.png, confusion_matrix.png"
        left_out["matplotlib"] = of_report if cfg.log.report else "TensorBoard's pictures"
    if cfg.log.tensorboard and not has_tensorboard():
        left_out["tensorboard"] = "logs/tensorboard"
    if left_out:
        logger.info(f"left out: {', '.join(left_out.values())} (pip install {' '.join(left_out)})")
