"""TensorBoard's event files, written record by record: no thread, no open file, safe to fork.

`train`, `val` and `test` are folders of their own, so that a chart shows them over each other. What
the files say is the state's history: a resume writes them anew, up to what its checkpoint knows, and
they go on from there. Pictures and the graph of before are carried over.
"""

import contextlib
import copy
import io
import os
import platform
import re
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams

from cnn import config
from cnn.metrics import scores
from cnn.metrics.scores import Metrics
from cnn.records import figures, report
from cnn.training.setup import Run
from cnn.training.state import TIME_COLUMNS
from cnn.utils.files import write_atomically

STAMP = re.compile(r"tfevents\.(\d+)\.")
PARTS = ("train", "val", "test", "")  # folders; hyperparameters lie in the one above


class TensorBoard:
    """The event files of a run."""

    def __init__(self, run: Run):
        self.folder, self.run, self.state = run.folder.logs.tensorboard, run, run.state
        self.files: dict[str, Path] = {}
        self._whole = False  # whether the files hold all that the state knows
        self._tested = False
        self._pictured: int | None = None  # the epoch whose confusion matrix is in the files

    def rewind(self) -> None:
        """Writes the files anew: what the state knows, and what was kept of the pictures."""
        self._whole = False
        rows, kept = self.state.history, self._kept()
        if not kept["train"]:
            kept["train"] += self._opening()
        pictured = {event.step for event in kept["val"]}
        self._pictured = None
        events = {part: list(kept[part]) for part in PARTS}
        for row in rows:
            for part, event in self._of_row(row):
                events[part].append(event)
        if not self.state.best or self._row_of_best()["step"] in pictured:
            self._pictured = self.state.best and self.state.best["epoch"]
        else:
            events["val"] += self._confusion()
        if self.state.test is not None:
            for part, event in self._of_test():
                events[part].append(event)
        for part in PARTS:
            self._replace(part, events[part])
        self._tested, self._whole = self.state.test is not None, True

    def append(self) -> None:
        """Adds the latest epoch and, once there is one, the test."""
        if not self._whole:  # the last write failed
            self.rewind()
            return
        self._whole = False
        if self.state.test is not None:
            new = [] if self._tested else self._of_test()
        else:
            new = self._of_row(self.state.history[-1])
            new += [("val", event) for event in self._confusion()]
        for part in PARTS:
            events = [event for where, event in new if where == part]
            if events:
                with open(self.files[part], "ab") as file:
                    file.write(_records(events))
        self._tested, self._whole = self.state.test is not None, True

    # -- events of what the state says ---------------------------------------------------------

    def _of_row(self, row: Metrics) -> list[tuple[str, Event]]:
        """The scalars of an epoch; at a time counted without interruptions."""
        seconds = sum(r["seconds"] for r in self.state.history[: row["epoch"]])
        found = []
        for name, value in row.items():
            part, _, tag = name.partition("_")
            if value is None or name in ("epoch", "step", *TIME_COLUMNS):
                continue
            part, tag = ("train", name) if part == "lr" else (part, tag)
            found.append((part, scalar(tag, value, row["step"], self._began() + seconds)))
        return found

    def _of_test(self) -> list[tuple[str, Event]]:
        """The test's figures, and the hyperparameters with them and the best validation."""
        state = self.state
        seconds = self._began() + sum(row["seconds"] for row in state.history)
        found = [
            ("test", scalar(name.removeprefix("test_"), value, state.step, seconds))
            for name, value in state.test.items()
            if value is not None
        ]
        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in config.flat(config.to_dict(self.run.cfg)).items()
        }
        final = {f"hparam/{name}": value for name, value in state.test.items() if value is not None}
        if state.best is not None:
            final[f"hparam/{state.best['metric']}"] = state.best["value"]
        for summary in hparams(settings, final):
            found.append(("", Event(wall_time=seconds, step=state.step, summary=summary)))
        found += [("", scalar(name, value, state.step, seconds)) for name, value in final.items()]
        return found

    def _began(self) -> float:
        """When the run started, whichever process goes on with it."""
        return time.mktime(time.strptime(self.run.metadata["started"][:19], "%Y-%m-%d %H:%M:%S"))

    def _row_of_best(self) -> Metrics:
        return self.state.history[self.state.best["epoch"] - 1]

    def _confusion(self) -> list[Event]:
        """The confusion matrix of a new best epoch, as a picture."""
        best, said = self.state.best, self.state.predictions.get("val")
        if not figures.is_available() or said is None or self._pictured == best["epoch"]:
            return []
        classes, labels = self.run.data.classes, self.run.data.val.labels
        matrix = scores.confusion(labels, said["prediction"].numpy(), len(classes))
        title = f"validation, epoch {best['epoch']}"
        picture_of = figures.confusion_png(matrix, classes, title)
        self._pictured = best["epoch"]
        return [picture("confusion", picture_of, self._row_of_best()["step"])]

    def _opening(self) -> list[Event]:
        """The graph of the model, and the first training images as they are augmented."""
        events = self._graph()
        if figures.is_available():
            images = report.first_training_images(self.run)
            pixels = [report.as_pixels(image) for image, _ in images]
            grid = figures.grid_png(pixels, [label for _, label in images])
            events.append(picture("training images", grid, 0))
        return events

    def _graph(self) -> list[Event]:
        from torch.utils.tensorboard._pytorch_graph import graph

        pre, model = self.run.data.preprocessing, self.state.model
        shape = (1, pre.channels, pre.image_size, pre.image_size)
        image = torch.zeros(shape, device=self.state.device)
        try:
            with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
                warnings.simplefilter("ignore")  # of tracing, that a shape is taken for a constant
                made, _ = graph(copy.deepcopy(model), image)  # tracing runs it
        except Exception:  # noqa: BLE001  not every model can be traced; it is one picture less
            return []
        return [Event(wall_time=self._began(), graph_def=made.SerializeToString())]

    # -- files ----------------------------------------------------------------------------------

    def _old_files(self, part: str) -> list[Path]:
        return sorted((self.folder / part).glob("*tfevents*"))

    def _kept(self) -> dict[str, list[Event]]:
        """What earlier files hold besides scalars, up to the state's step, each once."""
        kept: dict[str, list[Event]] = {part: [] for part in PARTS}
        for part in ("train", "val"):
            seen = set()
            for path in self._old_files(part):
                for event in _events_of(path):
                    tags = [v.tag for v in event.summary.value if v.HasField("image")]
                    key = "graph" if event.HasField("graph_def") else tuple(tags)
                    if key and event.step <= self.state.step and (key, event.step) not in seen:
                        seen.add((key, event.step))
                        kept[part].append(event)
        return kept

    def _replace(self, part: str, events: list[Event]) -> None:
        """Puts a new file in the place of those that are there."""
        folder = self.folder / part
        old = self._old_files(part)
        folder.mkdir(parents=True, exist_ok=True)
        # Sorts after every older one: what reads both takes this one's word.
        found = [STAMP.search(path.name) for path in old]
        stamp = max([int(time.time()), *(int(match[1]) + 1 for match in found if match)])
        name = f"events.out.tfevents.{stamp:010}.{platform.node() or 'here'}.{os.getpid()}.0"
        start = [
            Event(wall_time=time.time(), file_version="brain.Event:2"),
            # A reader that has seen the older files forgets what they said.
            Event(wall_time=time.time(), step=0, session_log=SessionLog(status=SessionLog.START)),
        ]
        data = _records([*start, *events])
        write_atomically(folder / name, lambda file: file.write(data))
        for path in old:
            path.unlink(missing_ok=True)
        self.files[part] = folder / name


def scalar(tag: str, value: float, step: int, wall_time: float) -> Event:
    values = [Summary.Value(tag=tag, simple_value=value)]
    return Event(wall_time=wall_time, step=step, summary=Summary(value=values))


def picture(tag: str, png: bytes, step: int) -> Event:
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))  # PNG's header
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    values = [Summary.Value(tag=tag, image=image)]
    return Event(wall_time=time.time(), step=step, summary=Summary(value=values))


def _records(events: list[Event]) -> bytes:
    file = io.BytesIO()
    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString())
    return file.getvalue()


def _events_of(path: Path) -> Iterator[Event]:
    """The events of a file, up to where a crash may have torn it."""
    try:
        yield from LegacyEventFileLoader(str(path)).Load()
    except Exception:  # noqa: BLE001  a torn file; the rest comes from the state
        return
