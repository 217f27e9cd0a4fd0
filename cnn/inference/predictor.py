"""Predicting the classes of pictures, for predict.py and for other programs.

    from cnn.inference import load

    predictor = load("checkpoints/best.pth")
    prediction = predictor("photo.jpg")  # a path, a PIL image or an array; or a list of them
    print(prediction.classes[0], prediction.probabilities[0])

A picture is prepared as a validation image is: `open_image`, `to_array`, `Form.apply`, `Normalize`.
"""

import contextlib
import io
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image

from cnn.datasets.decode import open_image, to_array, upright
from cnn.datasets.loader import EVALUATION_BATCHES
from cnn.datasets.order import split_epoch
from cnn.datasets.preprocessing import Normalize
from cnn.errors import BadImage, DataFailed, Refused
from cnn.inference import host
from cnn.inference.trained_model import TrainedModel, load_trained_model
from cnn.models.cam import grad_cam, overlay
from cnn.utils import seeding
from cnn.utils.cpus import usable_cpus

Encoded = bytes | bytearray | memoryview
Picture = str | os.PathLike | Encoded | BinaryIO | Image.Image | np.ndarray
ARRAY = "a uint8 array (H, W), (H, W, 3) as RGB, or (H, W, 4)"
TAKEN = f"expected a path, bytes of an image file, an open binary file or PIL image, or {ARRAY}"


@dataclass(frozen=True)
class Prediction:
    """The most probable classes of a picture, with their probabilities.

    Attributes:
        classes: the names of the classes. The predicted class comes first. It is the most probable
            class, unless the checkpoint has a threshold for the positive class.
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
        self._pre, self._form = trained.preprocessing, trained.preprocessing.form
        if self._pre.channels not in (1, 3):
            advice = "a file is gray or in colour; evaluate.py takes what the model was trained on"
            fault = f"expected a model of 1 or 3 channels, got {self._pre.channels}"
            raise Refused(f"{trained.path}: {fault}; {advice}")
        self._normalize = Normalize(self._pre, trained.device)
        self._batch_size = EVALUATION_BATCHES * trained.cfg.data.batch_size
        typed = trained.cfg.data.num_workers if "data.num_workers" in trained.typed else None
        self._num_threads = usable_cpus() if typed is None else max(typed, 1)

    def __call__(
        self, pictures: Picture | Iterable[Picture], top: int | None = None
    ) -> Prediction | list[Prediction]:
        """Predicts the classes of one picture or of a list of pictures.

        Args:
            pictures: one picture or several pictures. A picture is a path, the bytes of an image
                file, a file that is open for reading in binary mode, a PIL image of any mode, or a
                uint8 array. The shape of an array is (H, W), (H, W, 1), (H, W, 3) or (H, W, 4). The
                channels of an array are in the order RGB or RGBA. An array of OpenCV has the order
                BGR, and is given as `array[:, :, ::-1]`.
            top: the number of most probable classes in a prediction. None means all classes.

        Returns:
            A prediction for one picture, or a list of predictions for several pictures.

        Raises:
            BadImage: a picture cannot be read or is of another type. The message contains the path
                of a picture that is a file. BadImage is a subclass of ValueError.
            ValueError: `top` is not a whole number of at least 1.
        """
        if _is_single(pictures):
            return self([pictures], top)[0]
        predictions = []
        for prediction in self.predict_each(pictures, top):
            if isinstance(prediction, BadImage):
                raise prediction
            predictions.append(prediction)
        return predictions

    def predict_each(
        self, pictures: Picture | Iterable[Picture], top: int | None = None
    ) -> Iterator[Prediction | BadImage]:
        """Returns an iterator over the predictions of pictures, in the order of the pictures.

        For a picture that cannot be read or is of another type, the iterator yields a BadImage
        exception and continues with the next picture.

        Args:
            pictures: the pictures, of the types that `__call__` takes. All are taken from an
                iterator before the first prediction.
            top: the number of most probable classes in a prediction. None means all classes.

        Raises:
            ValueError: `top` is not a whole number of at least 1.
        """
        if top is not None and (
            isinstance(top, bool) or not isinstance(top, int | np.integer) or top < 1
        ):
            expected = "a whole number of at least 1, or None for all classes"
            raise ValueError(f"top: expected {expected}, got {top!r}")
        return self._predict_each([pictures] if _is_single(pictures) else list(pictures), top)

    def _predict_each(
        self, pictures: list[Picture], top: int | None
    ) -> Iterator[Prediction | BadImage]:
        for number, images in enumerate(self._decode_batches(pictures)):
            good = [image for image in images if isinstance(image, torch.Tensor)]
            predict = partial(self._predict_batch, good, number, top)
            predictions = iter(host.call_after_fork(predict) if good else [])
            for image in images:
                yield image if isinstance(image, BadImage) else next(predictions)

    def check_maps(self) -> None:
        """Raises Refused if the model is not a convolutional network, so that `look` would."""
        shape, device = self._pre.shape, self.trained.device
        index = torch.zeros(1, dtype=torch.int64, device=device)
        grad_cam(self.model, torch.zeros(1, *shape, device=device), index)

    def look(self, picture: Picture, name: str) -> torch.Tensor:
        """Returns a picture with a map of where the network sees a class (Grad-CAM).

        Only one thread may call this method, and no other method meanwhile.

        Args:
            picture: a picture of one of the types that `__call__` takes.
            name: the name of the class.

        Returns:
            The picture in the size of the model, uint8 (3, size, size).

        Raises:
            BadImage: the picture cannot be read.
            Refused: the model is not a convolutional network.
        """
        image, device = self._prepare(picture), self.trained.device
        if isinstance(image, BadImage):
            raise image
        index = torch.tensor([self.classes.index(name)], device=device)
        with self.trained.autocast():
            maps = grad_cam(self.model, self._normalize(image[None].to(device)), index)
        return overlay(image, maps[0])

    def _decode_batches(self, pictures: list[Picture]) -> Iterator[list[torch.Tensor | BadImage]]:
        """Decodes pictures and yields the decoded pictures in batches.

        While the caller uses a batch, threads decode the next batch.

        Args:
            pictures: the pictures, of the types that `__call__` takes.

        Yields:
            A list with an entry per picture of the batch. An entry is a uint8 tensor (C, size,
            size). For a picture that cannot be read, the entry is a BadImage exception.
        """
        if len(pictures) == 1:
            yield [host.call_after_fork(partial(self._prepare, pictures[0]))]
            return
        start, upcoming = 0, []
        is_distinct = len(set(map(id, pictures))) == len(pictures)  # no two threads read one file
        pool = ThreadPoolExecutor(self._num_threads if is_distinct else 1)
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
            picture: a picture of one of the types that `__call__` takes.

        Returns:
            A uint8 tensor (C, size, size). If the picture cannot be read, a BadImage exception is
            returned and not raised.
        """
        try:
            image = _to_image(picture, self._form.least_side)
            pixels = to_array(image, self._form.channels, self._form.value_range)
        except (DataFailed, MemoryError):
            raise
        except Exception as error:  # noqa: BLE001  a file that is no file of Python raises anything
            reason = str(error) or type(error).__name__
            if isinstance(picture, str | os.PathLike):
                return BadImage(f"{os.fspath(picture)}: {reason}")
            return BadImage(f"picture: {reason}; {TAKEN}")
        return self._form.apply(torch.from_numpy(pixels))

    @torch.no_grad()
    def _predict_batch(
        self, images: list[torch.Tensor], batch_index: int, top: int | None
    ) -> list[Prediction]:
        """Predicts the classes of each image in a batch.

        Args:
            images: the decoded images, each uint8 (C, size, size).
            batch_index: the index of the batch, from 0. A model can draw random numbers even in
                evaluation mode. The index is part of the seed of these random numbers.
            top: the number of most probable classes in a prediction. None means all classes.

        Returns:
            A prediction for each image.
        """
        trained = self.trained
        batch = self._normalize(torch.stack(images).to(trained.device))
        with contextlib.ExitStack() as stack:
            if trained.draws:
                key = (trained.cfg.seed, seeding.EVALUATE, trained.seed_epoch("val"), batch_index)
                stack.enter_context(host.generators_borrowed(trained.device))
                seeding.seed_step(trained.device, *key)
            stack.enter_context(trained.autocast())
            logits = self.model(batch).float()
        # Sorted by logits, since rounding may make probabilities equal: the first is the argmax.
        order = logits.sort(dim=1, descending=True, stable=True).indices[:, :top]
        probabilities = (logits / trained.temperature).softmax(1)
        if trained.threshold is not None:  # the positive class is the second one
            is_positive = (probabilities[:, 1].double() >= trained.threshold).long()[:, None]
            order = torch.cat([is_positive, 1 - is_positive], 1)[:, :top]
        probabilities = probabilities.gather(1, order).tolist()
        classes = [[self.classes[index] for index in indices] for indices in order.tolist()]
        return list(map(Prediction, classes, probabilities))


def load(checkpoint: str | os.PathLike, *settings: str) -> Predictor:
    """Makes a predictor from the checkpoint of a trained model.

    The random generators, the threads and the settings of the process stay as they are. The process
    may be forked afterwards. The predictor may be called from several threads.

    Args:
        checkpoint: the path of a checkpoint that train.py saved. No other file is needed.
        settings: settings in the form of the command line, such as "device=cpu". These settings
            replace settings in the checkpoint.

    Raises:
        Refused: the file is not a checkpoint or is damaged, or a setting is not valid. Refused is
            also raised if the checkpoint names Python code outside the current folder. Refused is a
            subclass of ValueError.
    """
    host.import_torchvision()
    return host.in_new_thread(lambda: Predictor(load_trained_model(Path(checkpoint), settings)))


def _is_single(pictures: object) -> bool:
    """Returns whether an argument is one picture, or something that is no list of pictures."""
    is_picture = isinstance(pictures, Picture | torch.Tensor) or hasattr(pictures, "read")
    return is_picture or not isinstance(pictures, Iterable)


def _to_image(picture: object, least_side: int | None) -> Image.Image:
    """Returns a picture as an upright PIL image.

    Args:
        picture: a picture of one of the types that `Predictor.__call__` takes.
        least_side: the pixels that the shorter side of a JPEG file needs at least, or None for all.

    Raises:
        BadImage: the picture cannot be read or is of another type.
    """
    if isinstance(picture, Encoded):
        picture = io.BytesIO(picture)
    is_file = hasattr(picture, "read") and not isinstance(picture, io.TextIOBase)
    if is_file or isinstance(picture, str | os.PathLike):
        return open_image(picture, least_side)
    if isinstance(picture, np.ndarray):
        got = f"{picture.dtype} {picture.shape}"
        is_image = picture.ndim == 2 or (picture.ndim == 3 and picture.shape[2] in (1, 3, 4))
        if picture.dtype == np.uint8 and is_image and picture.size:
            return Image.fromarray(picture[:, :, 0] if picture.shape[2:] == (1,) else picture)
    elif isinstance(picture, Image.Image):
        got = f"a PIL image of {picture.width} x {picture.height} pixels"
        if 0 not in picture.size:
            picture.load()
            return upright(picture)
    else:
        got = type(picture).__name__
    raise BadImage(f"got {got}")
