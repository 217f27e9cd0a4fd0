"""What a trained model says of pictures: for predict.py, and for programs of your own.

    from cnn.inference import load

    predict = load("checkpoints/best.pth")
    said = predict("photo.jpg")                  # a path, a PIL image, an array; or a list of them
    print(said.classes[0], said.probabilities[0])

A picture goes the way that a validation image goes: `decode`, `resize_and_crop`, `Normalize`.
"""

import contextlib
import os
import random
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from cnn.datasets.decode import decode, to_array, upright
from cnn.datasets.loader import EVALUATION_BATCHES
from cnn.datasets.order import split_epoch
from cnn.datasets.preprocessing import Normalize, resize_and_crop
from cnn.errors import BadImage, Refused
from cnn.inference.trained_model import TrainedModel, load_trained_model
from cnn.utils import seeding

Picture = str | os.PathLike | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """What was said of a picture, the likeliest class first."""

    classes: list[str]
    probabilities: list[float]


class Predictor:
    """Says which classes pictures show. Made by `load`.

    Attributes:
        classes: names, in the order of the model's outputs.
        model: the network, in evaluation mode; takes normalised images (N, C, size, size).
    """

    def __init__(self, trained: TrainedModel):
        self.trained, self.model, self.classes = trained, trained.model, trained.classes
        self._pre = trained.preprocessing
        if self._pre.channels not in (1, 3):
            raise Refused(
                f"{trained.path}: the model takes images of {self._pre.channels} channels, and"
                f" pictures have 1 or 3"
            )
        self._normalize = Normalize(self._pre, trained.device)
        self._batch_size = EVALUATION_BATCHES * trained.cfg.data.batch_size
        typed = trained.cfg.data.num_workers if "data.num_workers" in trained.typed else None
        self._threads = os.cpu_count() if typed is None else max(typed, 1)

    def __call__(
        self, pictures: Picture | Sequence[Picture], top: int | None = None
    ) -> Prediction | list[Prediction]:
        """Predicts a picture or a list of them.

        Args:
            pictures: paths, PIL images of any mode, or arrays uint8 (H, W[, 3 or 4]).
            top: give only that many classes.

        Returns:
            A prediction; of a list, a list.

        Raises:
            BadImage: one cannot be read; the message names it.
        """
        if isinstance(pictures, Picture):
            return self([pictures], top)[0]
        found = []
        for said in self.each(list(pictures), top):
            if isinstance(said, BadImage):
                raise said
            found.append(said)
        return found

    def each(
        self, pictures: Sequence[Picture], top: int | None = None
    ) -> Iterator[Prediction | BadImage]:
        """Predicts pictures in batches, the next ones decoded meanwhile, in their order.

        What cannot be read comes as the error, and the rest goes on.
        """
        for number, images in enumerate(self._decoded(pictures)):
            good = [image for image in images if isinstance(image, torch.Tensor)]
            said = iter(self._predict(torch.stack(good), number, top) if good else [])
            for image in images:
                yield next(said) if isinstance(image, torch.Tensor) else image

    def _decoded(self, pictures: Sequence[Picture]) -> Iterator[list[torch.Tensor | BadImage]]:
        """The pictures in the batches of a validation, decoded by threads, one batch ahead."""
        waiting: deque[list[Future]] = deque()
        start = 0
        pool = ThreadPoolExecutor(self._threads)
        try:
            for size in split_epoch(len(pictures), self._batch_size):
                part = pictures[start : start + size]
                waiting.append([pool.submit(self._prepared, picture) for picture in part])
                start += size
                if len(waiting) > 1:
                    yield [future.result() for future in waiting.popleft()]
            while waiting:
                yield [future.result() for future in waiting.popleft()]
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepared(self, picture: Picture) -> torch.Tensor | BadImage:
        """A picture as the loader gives it: uint8 (C, size, size)."""
        channels = self._pre.channels
        try:
            if isinstance(picture, Image.Image):
                pixels = to_array(upright(picture), channels)
            elif isinstance(picture, np.ndarray):
                pixels = to_array(_as_image(picture), channels)
            else:
                pixels = decode(Path(picture), channels)
        except BadImage as bad:
            is_path = isinstance(picture, (str, os.PathLike))
            return BadImage(f"{os.fspath(picture) if is_path else 'picture'}: {bad}")
        return resize_and_crop(torch.from_numpy(pixels), self._pre.image_size)

    @torch.no_grad()
    def _predict(self, images: torch.Tensor, number: int, top: int | None) -> list[Prediction]:
        """A batch, uint8 (N, C, size, size); its number keys a model that draws, as validating."""
        trained = self.trained
        key = (trained.cfg.seed, seeding.EVALUATE, trained.drawing_epoch("val"), number)
        with _generators_kept(trained.device):
            seeding.seed_step(trained.device, *key)
            with trained.autocast():
                logits = self.model(self._normalize(images.to(trained.device)))
        # By the logits, so that the first is the argmax where rounding makes probabilities equal.
        order = logits.float().sort(dim=1, descending=True, stable=True).indices[:, :top]
        probabilities = logits.float().softmax(1).gather(1, order).cpu().tolist()
        return [
            Prediction([self.classes[index] for index in indices], given)
            for indices, given in zip(order.cpu().tolist(), probabilities)
        ]


def load(checkpoint: str | os.PathLike, *settings: str) -> Predictor:
    """Loads a trained model; all that it needs is in the checkpoint.

    Args:
        checkpoint: a file of train.py.
        settings: `key=value` as on the command line: "device=cpu", "data.batch_size=16".

    Raises:
        Refused: the file is none, is damaged, or names code outside this folder; a ValueError.
    """
    with _generators_kept(None):
        return Predictor(load_trained_model(Path(checkpoint), settings))


def _as_image(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or not (
        array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    ):
        raise BadImage(
            f"expected an array uint8 (H, W), (H, W, 3) or (H, W, 4), got {array.dtype}"
            f" {array.shape}"
        )
    return Image.fromarray(array[:, :, 0] if array.ndim == 3 and array.shape[2] == 1 else array)


@contextlib.contextmanager
def _generators_kept(device: torch.device | None) -> Iterator[None]:
    """Leaves the generators of the program around as they were."""
    states = random.getstate(), np.random.get_state()
    on_cuda = [device] if device is not None and device.type == "cuda" else []
    try:
        with torch.random.fork_rng(on_cuda):
            yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
