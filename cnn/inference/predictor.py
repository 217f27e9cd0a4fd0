"""Predicting the classes of pictures, for predict.py and for other programs.

    from cnn.inference import load

    predictor = load("checkpoints/best.pth")
    prediction = predictor("photo.jpg")  # a path, a PIL image or an array; or a list of them
    print(prediction.classes[0], prediction.probabilities[0])

A picture is prepared as a validation image is: `decode`, `resize_and_crop`, `Normalize`.
"""

import contextlib
import os
import random
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
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
from cnn.utils.cpus import usable_cpus

Picture = str | os.PathLike | Image.Image | np.ndarray


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of a picture, with their probabilities.

    Attributes:
        classes: the names of the classes. The most probable class comes first.
        probabilities: the probability of each class in `classes`, from 0 to 1.
    """

    classes: list[str]
    probabilities: list[float]


class Predictor:
    """A trained model that predicts the classes of pictures.

    The function `load` makes a predictor from a checkpoint.

    Args:
        trained: the model and its checkpoint.

    Attributes:
        classes: the names of the classes, in the order of the logits.
        model: the network in evaluation mode. The network takes normalized images (N, C, size,
            size) and returns logits (N, classes).
        trained: the model and its checkpoint.

    Raises:
        Refused: the model takes neither 1 nor 3 channels.
    """

    def __init__(self, trained: TrainedModel):
        self.trained, self.model, self.classes = trained, trained.model, trained.classes
        self._pre = trained.preprocessing
        if self._pre.channels not in (1, 3):
            raise Refused(f"{trained.path}: expected 1 or 3 channels, got {self._pre.channels}")
        self._normalize = Normalize(self._pre, trained.device)
        self._batch_size = EVALUATION_BATCHES * trained.cfg.data.batch_size
        typed = trained.cfg.data.num_workers if "data.num_workers" in trained.typed else None
        self._num_threads = usable_cpus() if typed is None else max(typed, 1)

    def __call__(
        self, pictures: Picture | Sequence[Picture], top: int | None = None
    ) -> Prediction | list[Prediction]:
        """Predicts the classes of one picture or of a list of pictures.

        Args:
            pictures: one picture or a list of pictures. A picture is a path, a PIL image of any
                mode, or a uint8 array. The shape of an array is (H, W), (H, W, 1), (H, W, 3) or (H,
                W, 4).
            top: the number of most probable classes in a prediction. None means all classes.

        Returns:
            A prediction for one picture, or a list of predictions for a list of pictures.

        Raises:
            BadImage: a picture cannot be read. The message contains the path of a picture that is a
                file.
        """
        if isinstance(pictures, Picture):
            return self([pictures], top)[0]
        predictions = []
        for prediction in self.predict_each(list(pictures), top):
            if isinstance(prediction, BadImage):
                raise prediction
            predictions.append(prediction)
        return predictions

    def predict_each(
        self, pictures: Sequence[Picture], top: int | None = None
    ) -> Iterator[Prediction | BadImage]:
        """Yields the prediction of each picture, in the order of the pictures.

        For a picture that cannot be read, a BadImage exception is yielded and not raised.

        Args:
            pictures: the pictures. A picture is a path, a PIL image of any mode, or a uint8 array.
                The shape of an array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4).
            top: the number of most probable classes in a prediction. None means all classes.
        """
        for number, images in enumerate(self._decode_batches(pictures)):
            good = [image for image in images if isinstance(image, torch.Tensor)]
            predictions = iter(self._predict_batch(torch.stack(good), number, top) if good else [])
            for image in images:
                yield image if isinstance(image, BadImage) else next(predictions)

    def _decode_batches(
        self, pictures: Sequence[Picture]
    ) -> Iterator[list[torch.Tensor | BadImage]]:
        """Decodes pictures and yields the decoded pictures in batches.

        While the caller uses a batch, threads decode the next batch.

        Args:
            pictures: paths, PIL images or uint8 arrays.

        Yields:
            A list with an entry per picture of the batch. An entry is a uint8 tensor (C, size,
            size). For a picture that cannot be read, the entry is a BadImage exception.
        """
        start, upcoming = 0, []
        pool = ThreadPoolExecutor(self._num_threads)
        try:
            for size in [*split_epoch(len(pictures), self._batch_size), 0]:
                batch = pictures[start : start + size]
                current, upcoming = upcoming, [pool.submit(self._prepare, one) for one in batch]
                start += size
                if current:
                    yield [future.result() for future in current]
        finally:
            pool.shutdown(cancel_futures=True)

    def _prepare(self, picture: Picture) -> torch.Tensor | BadImage:
        """Decodes a picture, and resizes and crops the picture for the model.

        Args:
            picture: a path, a PIL image or a uint8 array.

        Returns:
            A uint8 tensor (C, size, size). If the picture cannot be read, a BadImage exception is
            returned and not raised.
        """
        is_path, channels = isinstance(picture, str | os.PathLike), self._pre.channels
        try:
            if is_path:
                pixels = decode(Path(picture), channels)
            else:
                image = _to_image(picture) if isinstance(picture, np.ndarray) else upright(picture)
                pixels = to_array(image, channels)
        except BadImage as bad:
            return BadImage(f"{os.fspath(picture) if is_path else 'picture'}: {bad}")
        return resize_and_crop(torch.from_numpy(pixels), self._pre.image_size)

    @torch.no_grad()
    def _predict_batch(
        self, images: torch.Tensor, batch_index: int, top: int | None
    ) -> list[Prediction]:
        """Predicts the classes of each image in a batch.

        Args:
            images: the decoded images, uint8 (N, C, size, size).
            batch_index: the index of the batch, from 0. A model can draw random numbers even in
                evaluation mode. The index is part of the seed of these random numbers.
            top: the number of most probable classes in a prediction. None means all classes.

        Returns:
            A prediction for each image.
        """
        trained = self.trained
        key = (trained.cfg.seed, seeding.EVALUATE, trained.seed_epoch("val"), batch_index)
        with _generators_preserved(trained.device):
            seeding.seed_step(trained.device, *key)
            with trained.autocast():
                logits = self.model(self._normalize(images.to(trained.device))).float()
        # Sorted by logits, since rounding may make probabilities equal: the first is the argmax.
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
        probabilities = logits.softmax(1).gather(1, order).tolist()
        classes = [[self.classes[index] for index in indices] for indices in order.tolist()]
        return list(map(Prediction, classes, probabilities))


def load(checkpoint: str | os.PathLike, *settings: str) -> Predictor:
    """Makes a predictor from the checkpoint of a trained model.

    Args:
        checkpoint: the path of a checkpoint that train.py saved. No other file is needed.
        settings: settings in the form of the command line, such as "device=cpu". These settings
            replace settings in the checkpoint.

    Raises:
        Refused: the file is not a checkpoint or is damaged, or a setting is not valid. Refused is
            also raised if the checkpoint names Python code outside the current folder. Refused is a
            subclass of ValueError.
    """
    with _generators_preserved(None):
        return Predictor(load_trained_model(Path(checkpoint), settings))


def _to_image(array: np.ndarray) -> Image.Image:
    is_image = array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3, 4))
    if array.dtype != np.uint8 or not is_image:
        expected = "an array uint8 (H, W), (H, W, 3) or (H, W, 4)"
        raise BadImage(f"expected {expected}, got {array.dtype} {array.shape}")
    return Image.fromarray(array[:, :, 0] if array.shape[2:] == (1,) else array)


@contextlib.contextmanager
def _generators_preserved(device: torch.device | None) -> Iterator[None]:
    """Restores the global random generators at the end of a `with` block.

    The generators then have the same state as at the start of the block. The function restores the
    generators of Python, of NumPy and of torch on the CPU. If `device` is a CUDA device, the
    generator of `device` is restored, too.

    Args:
        device: the device that the block uses. None if the block uses only the CPU.
    """
    cuda_devices = [device] if device is not None and device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())
        stack.enter_context(torch.random.fork_rng(cuda_devices))
        yield
