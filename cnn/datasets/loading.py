"""Batches: which images, in which order, changed how, on the device, ready for the model.

The order of an epoch is a function of (seed, epoch), what is random about an image one of (seed,
epoch, index); so an epoch can be entered at any batch, at once, with any number of workers.
"""

import contextlib
import signal
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cnn.datasets import Preprocessing
from cnn.datasets.augment import Transform, build_augmentations, fit
from cnn.datasets.images import Images
from cnn.utils import seeding

Key = tuple[int, int]  # epoch, index of the image
Batch = tuple[torch.Tensor, torch.Tensor]  # images float (N, C, H, W), labels int64 (N)

EVALUATION = 0  # stands for the epoch where images come as they are

SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


def split_epoch(number: int, batch_size: int) -> list[int]:
    """Sizes of an epoch's batches; a last image alone joins the batch before it.

    BatchNorm cannot train on one value a channel, and no image is to be left out.
    """
    sizes = [batch_size] * (number // batch_size)
    rest = number % batch_size
    if rest == 1 and sizes:
        sizes[-1] += 1
    elif rest:
        sizes.append(rest)
    return sizes


class Samples(Dataset):
    """Image and label for a key; what an epoch changes about the image is drawn from the key."""

    def __init__(
        self, images: Images, size: int, channels: int, augment: list[Transform], seed: int
    ):
        self.images, self.size, self.channels = images, size, channels
        self.augment, self.seed = augment, seed
        self.labels = torch.from_numpy(images.labels)

    def __len__(self) -> int:
        return len(self.images)

    def raw(self, key: Key) -> torch.Tensor:
        """The image as the data has it, read with the generators keyed."""
        epoch, index = key
        seeding.seed_sample(self.seed, seeding.SAMPLE, epoch, index)
        return self.images[index]

    def image(self, key: Key) -> torch.Tensor:
        """The image as the model's batch gets it, before it is normalised: (C, size, size)."""
        image = self.raw(key)
        for change in self.augment:
            image = change(image)
        return fit(image, self.size)

    def __getitems__(self, keys: list[Key]) -> Batch:
        indices = torch.tensor([index for _, index in keys])
        pixels = getattr(self.images, "pixels", None)
        if pixels is not None and not self.augment and pixels.shape[-2:] == (self.size, self.size):
            return pixels[indices], self.labels[indices]
        return torch.stack([self.image(key) for key in keys]), self.labels[indices]


class _Plan:
    """The keys of each batch still to come; set anew before every epoch."""

    def __init__(self):
        self.batches: list[tuple[int, np.ndarray]] = []

    def set(self, epoch: int, order: np.ndarray, sizes: list[int], start: int) -> None:
        ends = np.cumsum(sizes)
        self.batches = [
            (epoch, order[ends[i] - sizes[i] : ends[i]]) for i in range(start, len(sizes))
        ]

    def __iter__(self) -> Iterator[list[Key]]:
        for epoch, indices in self.batches:
            yield [(epoch, index) for index in indices.tolist()]

    def __len__(self) -> int:
        return len(self.batches)


class Loader:
    """Gives a split's batches on the device, shuffled and augmented for training or as they are."""

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        batch_size: int,
        device: torch.device,
        *,
        seed: int = 0,
        augment: list[str] = [],  # noqa: B006
        num_workers: int = 0,
    ):
        if hasattr(images, "channels"):
            images.channels = preprocessing.channels
        size = preprocessing.image_size
        transforms = build_augmentations(augment, size)
        self.samples = Samples(images, size, preprocessing.channels, transforms, seed)
        self.sizes = split_epoch(len(images), batch_size)
        self.device, self.seed = device, seed
        self._normalize = Normalize(preprocessing, device)
        self._plan = _Plan()
        self._loader = DataLoader(
            self.samples,
            batch_sampler=self._plan,
            collate_fn=_as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=_ignore_signals,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed that nothing here uses
        )

    def __len__(self) -> int:
        return len(self.sizes)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; those before are never read."""
        return self._batches(epoch, self.order(epoch), start)

    def order(self, epoch: int) -> np.ndarray:
        """The order of the images in an epoch."""
        key = seeding.mix(self.seed, seeding.ORDER, epoch)
        return np.random.default_rng(key).permutation(len(self.samples))

    def keys(self, epoch: int, batch: int) -> list[Key]:
        """The images of one batch."""
        start = sum(self.sizes[:batch])
        order = self.order(epoch)[start : start + self.sizes[batch]]
        return [(epoch, index) for index in order.tolist()]

    def batches(self) -> Iterator[Batch]:
        """All images, in their order, unchanged."""
        return self._batches(EVALUATION, np.arange(len(self.samples)), 0)

    def _batches(self, epoch: int, order: np.ndarray, start: int) -> Iterator[Batch]:
        self._plan.set(epoch, order, self.sizes, start)
        with _signals_blocked():  # until the workers that start here ignore them
            batches = iter(self._loader)
        for images, labels in batches:
            yield (
                self._normalize(images.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )


class Normalize:
    """Pixels as the model wants them: float, mean 0 and std 1 over the training images."""

    def __init__(self, preprocessing: Preprocessing, device: torch.device):
        mean = torch.tensor(preprocessing.mean, dtype=torch.float32, device=device)
        std = torch.tensor(preprocessing.std, dtype=torch.float32, device=device)
        self.scale = (1 / std).view(1, -1, 1, 1)
        self.shift = (-mean / std).view(1, -1, 1, 1)

    def __call__(self, images: torch.Tensor) -> torch.Tensor:
        """(N, C, H, W), uint8 or float in 0..1, to normalised float32."""
        scale = self.scale / 255 if images.dtype == torch.uint8 else self.scale
        return images.float().mul_(scale).add_(self.shift)


def _as_it_is(batch: Batch) -> Batch:
    return batch


def _ignore_signals(worker: int) -> None:
    """A signal to the whole group is for the main process, which needs its workers to save."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


@contextlib.contextmanager
def _signals_blocked() -> Iterator[None]:
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
