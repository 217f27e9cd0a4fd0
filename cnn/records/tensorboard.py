"""TensorBoard's event files, which are made from the state, so that a resume leaves one curve.

At its start, a process rewrites the files from the history in the state. Later, the process appends
to the files. The state does not contain the graph and earlier images, which are copied from the old
files. The events are written without a SummaryWriter, whose thread and open file would not survive
a fork.

`train`, `val` and `test` are separate folders, so that one chart shows all three.
"""

import contextlib
import copy
import io
import itertools
import platform
import time
import warnings
from collections.abc import Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import IO

import torch
from tensorboard.backend.event_processing.event_file_loader import LegacyEventFileLoader
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.record_writer import RecordWriter
from torch.utils.tensorboard.summary import hparams, scalar

from cnn import config
from cnn.metrics.scores import Metrics
from cnn.records import figures, report
from cnn.training.run import Run
from cnn.utils.files import write_atomically

PARTS = ("train", "val", "test", "")  # subfolders; "" is the folder itself, for hyperparameters


class TensorBoard:
    """The writer of a run's TensorBoard event files.

    Args:
        run: the run whose metrics are written.
    """

    def __init__(self, run: Run):
        self.folder, self.run, self.state = run.folder.logs.tensorboard, run, run.state
        self._files: dict[str, Path] = {}  # the file of each part; {} if they have to be rewritten

    def _rewrite(self) -> None:
        """Replaces the event files by new files with the run's whole history.

        Events up to the present step with a picture or the model's graph are copied from the old
        files. All other events are made from the state of the run. Without old files, the graph and
        a picture of training images are made.
        """
        kept = {part: self._read_images(part) for part in PARTS}
        if not kept["train"]:
            kept["train"] = self._initial_events()
        self._num_epochs, self._has_test = 0, False  # what the new files contain
        self._matrix_steps = {event.step for event in kept["val"]}  # of the confusion matrices
        new = self._new_events()
        self._files = {part: self._replace(part, kept[part] + new[part]) for part in PARTS}

    def append(self) -> None:
        """Appends the epochs and the test that the event files do not contain yet.

        All event files are written anew if the last write failed or if nothing was written before.
        """
        if not self._files:  # the last write failed, or there was none
            self._rewrite()
            return
        files, self._files = self._files, {}
        for part, events in self._new_events().items():
            with open(files[part], "ab") as file:
                write_events(file, events)
        self._files = files

    # -- events ---------------------------------------------------------------------------------

    def _new_events(self) -> dict[str, list[Event]]:
        """Returns events for epochs and a test that the event files lack.

        The caller must write the events, because the next call does not return the same events
        again.

        Returns:
            A dict from "train", "val", "test" and "" to lists of events. The list for "" is for
            TensorBoard's HPARAMS page.
        """
        state, events = self.state, {part: [] for part in PARTS}
        # The time of an event is the start of the run plus the seconds of its epochs, so that
        # interruptions do not count.
        started = datetime.fromisoformat(self.run.metadata["started"][:19]).timestamp()
        seconds = (row["seconds"] for row in state.history)
        times = list(itertools.accumulate(seconds, initial=started))
        for row, now in list(zip(state.history, times[1:]))[self._num_epochs :]:
            add_scalars(events, row, row["step"], now)
        events["val"] += self._confusion_matrix()
        if state.test is not None and not self._has_test:
            add_scalars(events, state.test, state.step, times[-1])
            events[""] += self._hyperparameters(times[-1])
        self._num_epochs, self._has_test = len(state.history), state.test is not None
        return events

    def _hyperparameters(self, now: float) -> list[Event]:
        """Returns the events for TensorBoard's HPARAMS page: the run's settings and results.

        Args:
            now: the time of the events, in seconds since 1970.
        """
        state = self.state
        settings = {
            key: value if isinstance(value, (bool, int, float, str)) else str(value)
            for key, value in config.flat(config.to_dict(self.run.cfg)).items()
        }
        results = dict(state.test)
        if state.best is not None:
            results[state.best["metric"]] = state.best["value"]
        results = {f"hparam/{name}": value for name, value in results.items() if value is not None}
        summaries = [*hparams(settings, results), *itertools.starmap(scalar, results.items())]
        return [Event(wall_time=now, step=state.step, summary=summary) for summary in summaries]

    def _confusion_matrix(self) -> list[Event]:
        """Makes the event with a picture of the best epoch's confusion matrix.

        The confusion matrix is from the validation of the best epoch.

        Returns:
            A list with the event. The list is empty if the event files already contain the picture,
            or if there is no best epoch. The list is also empty if matplotlib is not installed.
        """
        best = self.state.best
        if not figures.is_available() or best is None or "val" not in self.state.predictions:
            return []
        step = self.state.history[best["epoch"] - 1]["step"]
        if step in self._matrix_steps:
            return []
        self._matrix_steps.add(step)
        return [image("confusion", report.confusion_png(self.run, "val"), step)]

    def _initial_events(self) -> list[Event]:
        """Makes the event with the model's graph and an event with a picture.

        The picture shows augmented training images. The graph is left out if the model cannot be
        traced. The picture is left out if matplotlib is not installed.

        Returns:
            A list of at most two events.
        """
        from torch.utils.tensorboard._pytorch_graph import graph

        events = []
        # A model that cannot be traced has no graph. Tracing warns of shapes taken for constants.
        with (
            contextlib.suppress(Exception),
            contextlib.redirect_stdout(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            images = torch.zeros(1, *self.run.data.preprocessing.shape, device=self.state.device)
            traced, _ = graph(copy.deepcopy(self.state.model), images)
            events.append(Event(wall_time=time.time(), graph_def=traced.SerializeToString()))
        if figures.is_available():
            images, labels = zip(*report.first_training_images(self.run))
            pixels = [report.as_pixels(image) for image in images]
            png = figures.png(figures.draw_images, pixels, labels)
            events.append(image("training images", png, 0))
        return events

    # -- files ----------------------------------------------------------------------------------

    def _read_images(self, part: str) -> list[Event]:
        """Reads the events with a picture or the model's graph from the existing files.

        Events after the present step of the run are left out. An event that is in two files is
        returned once.

        Args:
            part: the subfolder of the files: "train", "val" or "test". "" stands for the folder
                that contains the subfolders.
        """
        found: dict[tuple[int, str], Event] = {}
        for path in self._event_files(part):
            for event in read_events(path):
                is_image = any(value.HasField("image") for value in event.summary.value)
                if event.step <= self.state.step and (is_image or event.HasField("graph_def")):
                    found.setdefault((event.step, event.WhichOneof("what")), event)
        return list(found.values())

    def _event_files(self, part: str) -> list[Path]:
        return sorted((self.folder / part).glob("*tfevents*"))

    def _replace(self, part: str, events: list[Event]) -> Path:
        """Writes a new event file, and removes older event files in its folder.

        Args:
            part: the subfolder of the file: "train", "val" or "test". "" stands for the folder that
                contains the subfolders.
            events: the events to write.

        Returns:
            The path of the new file.
        """
        old = self._event_files(part)
        now = time.time()
        start = [
            Event(wall_time=now, file_version="brain.Event:2"),
            # This makes a reader drop the events of older files that it has read already.
            Event(wall_time=now, step=0, session_log=SessionLog(status=SessionLog.START)),
        ]
        # TensorBoard reads files in the order of their names, which contain the time.
        path = self.folder / part / f"events.out.tfevents.{time.time_ns()}.{platform.node()}"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, lambda file: write_events(file, [*start, *events]))
        for other in old:
            other.unlink(missing_ok=True)
        return path


def add_scalars(events: dict[str, list[Event]], metrics: Metrics, step: int, now: float) -> None:
    """Adds the metrics of an epoch or of the test to lists of events.

    The word before the first "_" in a metric's name selects the list. For example, "val_acc" is
    added to the list "val" as "acc". Learning rates, such as "lr", are added to the list "train".
    Other entries, and metrics that are None, are left out.

    Args:
        events: a list of events for each of "train", "val" and "test". The lists are extended in
            place.
        metrics: the metrics by name.
        step: the number of optimizer steps taken.
        now: the time of the events, in seconds since 1970.
    """
    for name, value in metrics.items():
        part, _, tag = name.partition("_")
        if part == "lr":
            part, tag = "train", name
        if part in PARTS and value is not None:
            events[part].append(Event(wall_time=now, step=step, summary=scalar(tag, value)))


def image(tag: str, png: bytes, step: int) -> Event:
    """Returns an event with a picture.

    Args:
        tag: the name of the picture in TensorBoard, such as "confusion".
        png: the bytes of a PNG file.
        step: the number of optimizer steps that the run had taken when the picture was made.
    """
    width, height = (int.from_bytes(png[i : i + 4], "big") for i in (16, 20))  # in PNG's header
    image = Summary.Image(width=width, height=height, colorspace=4, encoded_image_string=png)
    summary = Summary(value=[Summary.Value(tag=tag, image=image)])
    return Event(wall_time=time.time(), step=step, summary=summary)


def write_events(file: IO[bytes], events: Iterable[Event]) -> None:
    """Writes events to a file in TensorBoard's format.

    Args:
        file: a file that is open for writing in binary mode.
        events: the events to write.
    """
    writer = RecordWriter(file)
    for event in events:
        writer.write(event.SerializeToString())


def read_events(path: Path) -> Iterator[Event]:
    """Yields the events in a file up to the first unreadable event.

    An unreadable event, for example at the end of a file after a crash, raises no error.

    Args:
        path: the path of the event file.
    """
    with contextlib.suppress(Exception):  # a damaged file raises many kinds
        yield from LegacyEventFileLoader(str(path)).Load()
