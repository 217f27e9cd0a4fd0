"""Batches: which images, in which order, changed how, on the device, ready for the model.

The order of an epoch is a function of (seed, epoch), what is random about an image one of (seed,
epoch, index), and of its place in the epoch where an image may come twice; so an epoch can be
entered at any batch, at once, with any number of workers.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from cnn.config import DataConfig
from cnn.config.settings import AugmentationConfig
from cnn.datasets.augment import BATCH_DRAWS, Augmentation, BatchAugmentation
from cnn.datasets.images import Images
from cnn.datasets.order import EVALUATION, Key, draw_balanced, keys_of, share_of, split_epoch
from cnn.datasets.preprocessing import Normalize, Preprocessing, resize_and_crop
from cnn.datasets.workers import begin_worker, failed, kill_workers, packed, receive_batches
from cnn.errors import BadImage, DataFailed, Refused
from cnn.utils import seeding

logger = logging.getLogger(__name__)
Batch = tuple[torch.Tensor, torch.Tensor]  # images float (N, C, H, W), labels int64 (N)

MEMORY_LIMIT = 2 * 2**30  # bytes of pixels that are kept in memory by data.in_memory=auto
EVALUATION_BATCHES = 2  # times the training batch; 4 are slower for ResNets on a CPU, and take more
LARGEST_EVALUATION_BATCH = 512


def _as_it_is(batch: Any) -> Any:
    return batch


class Samples(Dataset):
    """Image and label for a key; what an epoch changes about the image is drawn from the key.

    Args:
        collate: makes a batch of a list of images, in the loader process.
    """

    def __init__(
        self,
        images: Images,
        size: int,
        augment: Augmentation,
        seed: int,
        collate: Callable[[list[torch.Tensor]], torch.Tensor] = torch.stack,
    ):
        self.images, self.size, self.augment, self.seed = images, size, augment, seed
        self.collate = collate
        self.labels = torch.from_numpy(images.labels)

    def __len__(self) -> int:
        return len(self.images)

    def raw(self, key: Key) -> torch.Tensor:
        if self.images.may_draw:
            seeding.seed_sample(self.seed, seeding.SAMPLE, *key)
        return self.images[key[1]]

    def image(self, key: Key) -> torch.Tensor:
        image = self.raw(key)
        return (
            resize_and_crop(image, self.size) if key[0] == EVALUATION else self.augment(image, key)
        )

    def __getitems__(self, keys: list[Key]) -> tuple[Batch, list[str]] | DataFailed:
        """A batch, and the names of what was left out of it; or why there is none.

        An error is given back, not raised: torch would wrap it in a loader process's traceback.
        """
        indices = torch.tensor([key[1] for key in keys])
        images, kept, left_out = [], [], []
        try:
            for number, key in enumerate(keys):
                try:
                    images.append(self.image(key))
                    kept.append(number)
                except BadImage as bad:
                    if not self.images.skip:
                        raise
                    left_out.append(str(bad))
            # BatchNorm cannot train on one image; and a lost folder is not left out bit by bit.
            if left_out and len(kept) < (1 if keys[0][0] == EVALUATION else 2):
                raise BadImage(f"{left_out[0]}, and so nearly all of its batch of {len(keys)}")
            return (self.collate(images), self.labels[indices[kept]]), left_out
        except BadImage as bad:
            advice = "put the image back as it was, and a run goes on at this very batch"
            return DataFailed(f"{bad}; {advice}")
        except (DataFailed, Refused) as error:  # too late to refuse the run
            return DataFailed(str(error))
        except Exception as error:  # noqa: BLE001  whatever an augmentation of the user's raises
            is_one = len(kept) + len(left_out) < len(keys)  # and not that of making a batch of them
            return failed(error, self.images.name(key[1]) if is_one else "the next batch")


class _Plan:
    """The keys of each batch still to come; set anew before every epoch."""

    def __init__(self):
        self._keys: Callable[[int, int], list[Key]]
        self._spans: list[tuple[int, int]] = []

    def set(self, keys: Callable[[int, int], list[Key]], spans: list[tuple[int, int]]) -> None:
        self._keys = keys  # of the images from one place of the epoch to another
        self._spans = spans

    def __iter__(self) -> Iterator[list[Key]]:
        return (self._keys(*span) for span in self._spans)

    def __len__(self) -> int:
        return len(self._spans)


class Loader:
    """Gives a split's batches on the device, shuffled and changed for training or as they are.

    Of several processes each has its share of every batch in training; in evaluation, where a batch
    is to have the same bits whoever computes it, they take whole batches in turn.

    Attributes:
        sizes: images in each batch of an epoch.
        own_sizes: those of them that are this process's in training.
    """

    def __init__(
        self,
        images: Images,
        preprocessing: Preprocessing,
        batch_size: int,
        device: torch.device,
        seed: int,
        sampler: str = "shuffle",
        rank: int = 0,
        num_ranks: int = 1,
    ):
        self.rank, self.num_ranks = rank, num_ranks
        self.images, self.device, self.seed = images, device, seed
        self.balanced = sampler == "balanced"
        self.size = preprocessing.image_size
        self.sizes = split_epoch(len(images), batch_size)
        self.own_sizes = [share_of(size, rank, num_ranks)[2] for size in self.sizes]
        self._normalize = Normalize(preprocessing, device)

    def __len__(self) -> int:
        return len(self.sizes)

    def num_batches_per_rank(self) -> int:
        """How many batches the busiest of the processes has in an evaluation."""
        return -(-len(self.sizes) // self.num_ranks)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from number `start` on; those before are never read."""
        return self._batches(epoch, self.order(epoch), start)

    def batches(self) -> Iterator[Batch]:
        """All images, in their order, unchanged; of several processes, each has batches in turn."""
        return self._batches(EVALUATION, np.arange(len(self.images)), 0)

    def _spans(self, epoch: int, start: int) -> list[tuple[int, int]]:
        """From where to where in the epoch this process's batches go, from number `start` on."""
        first = [0, *np.cumsum(self.sizes).tolist()]
        if epoch == EVALUATION:
            turns = range(self.rank, len(self.sizes), self.num_ranks)
            return [(first[i], first[i + 1]) for i in turns]
        shares = [share_of(size, self.rank, self.num_ranks) for size in self.sizes]
        return [
            (first[i] + shares[i][0], first[i] + shares[i][1]) for i in range(start, len(shares))
        ]

    def order(self, epoch: int) -> np.ndarray:
        """Which image stands at each place of an epoch."""
        rng = np.random.default_rng(seeding.mix(self.seed, seeding.ORDER, epoch))
        if self.balanced:
            return draw_balanced(self.images.labels, rng)
        return rng.permutation(len(self.images))

    def keys(self, epoch: int, batch: int) -> list[Key]:
        """The images of one batch."""
        start = sum(self.sizes[:batch])
        order = np.arange(len(self.images)) if epoch == EVALUATION else self.order(epoch)
        return keys_of(epoch, order, self.balanced, start, start + self.sizes[batch])

    def raw(self, key: Key) -> torch.Tensor:
        """The image as the data has it, (C, H, W)."""
        raise NotImplementedError

    def image(self, key: Key) -> torch.Tensor:
        """The image as the model's batch gets it, before it is normalised: (C, size, size)."""
        raise NotImplementedError

    def _batches(self, epoch: int, order: np.ndarray, start: int) -> Iterator[Batch]:
        raise NotImplementedError


class StreamLoader(Loader):
    """Reads image by image, in worker processes if there are any."""

    def __init__(self, *args, augment: list[AugmentationConfig], num_workers: int, **keywords):
        super().__init__(*args, **keywords)
        changes = Augmentation(augment, self.size, self.seed)
        # A GPU normalises itself, from a quarter of the bytes; on a CPU the workers do it.
        collate, self._finish = torch.stack, self._normalize
        if self.device.type == "cpu":
            collate, self._finish = self._normalize.stacked, _as_it_is
        self._samples = Samples(self.images, self.size, changes, self.seed, collate)
        self.raw, self.image = self._samples.raw, self._samples.image
        self._plan = _Plan()
        Finalize(None, kill_workers, exitpriority=0)  # when this process ends
        self._loader = DataLoader(
            self._samples,
            batch_sampler=self._plan,
            collate_fn=packed if num_workers else _as_it_is,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=begin_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the loader draws a seed that nothing here uses
        )

    def _batches(self, epoch: int, order: np.ndarray, start: int) -> Iterator[Batch]:
        """The planned batches as the loader gives them.

        Raises:
            DataFailed: an image cannot be read, or the loader processes do not load.
        """
        # Nothing of self: the loader would live in a circle, its workers until that is collected.
        keys = functools.partial(keys_of, epoch, order, self.balanced)
        self._plan.set(keys, self._spans(epoch, start))
        where = "the evaluation" if epoch == EVALUATION else f"epoch {epoch}"
        for (images, labels), left_out in receive_batches(self._loader, start + 1, where):
            for bad in left_out:
                logger.warning("%s; left out of its batch (data.on_bad_image=skip)", bad)
            yield (
                self._finish(images.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
            )


class MemoryLoader(Loader):
    """Gathers whole batches from pixels that lie on the device.

    What is random about an image comes from a table of draws that is a function of (seed, epoch):
    from row `index`, or from that of its place in the epoch where it may come twice.
    """

    def __init__(self, *args, pixels: torch.Tensor, augment: list[AugmentationConfig], **keywords):
        super().__init__(*args, **keywords)
        self._gather = BatchAugmentation(pixels.to(self.device), [cfg.name for cfg in augment])
        self._rows = torch.from_numpy(self.images.rows).to(self.device)
        self._labels = torch.from_numpy(self.images.labels).to(self.device)

    def _draws(self, epoch: int) -> torch.Tensor | None:
        if epoch == EVALUATION or not self._gather.names:
            return None
        return self._gather.draws(len(self.images), self.seed, epoch).to(self.device)

    def _batches(self, epoch: int, order: np.ndarray, start: int) -> Iterator[Batch]:
        draws = self._draws(epoch)
        order = torch.from_numpy(order).to(self.device)
        for begin, end in self._spans(epoch, start):
            indices = order[begin:end]
            rows = slice(begin, end) if self.balanced else indices
            images = self._gather(self._rows[indices], draws[rows] if draws is not None else None)
            yield self._normalize(images), self._labels[indices]

    def raw(self, key: Key) -> torch.Tensor:
        return self.images[key[1]]

    def image(self, key: Key) -> torch.Tensor:
        draws = self._draws(key[0])
        row = draws[[key[-1]]] if draws is not None else None
        return self._gather(self._rows[[key[1]]], row)[0]


def build_loader(
    cfg: DataConfig,
    images: Images,
    preprocessing: Preprocessing,
    device: torch.device,
    seed: int,
    *,
    training: bool,
    rank: int = 0,
    num_ranks: int = 1,
) -> Loader:
    """The quickest loader that serves: from memory where the pixels fit, else image by image.

    Which one it is depends on settings and data alone, never on the machine: they draw differently.

    Raises:
        Refused: data.in_memory is true and cannot be.
    """
    augment = cfg.augment if training else []
    batch_size = cfg.batch_size
    if not training:  # not so large that several processes could not take them in turn
        batch_size = min(EVALUATION_BATCHES * batch_size, max(batch_size, LARGEST_EVALUATION_BATCH))
    sampler = cfg.sampler if training else "shuffle"
    common = (images, preprocessing, batch_size, device, seed, sampler, rank, num_ranks)
    size, channels = preprocessing.image_size, preprocessing.channels
    slow = [change.name for change in cfg.augment if change.name not in BATCH_DRAWS]
    fits = images.num_decoded() * size * size * channels <= MEMORY_LIMIT and not slow
    if cfg.in_memory is True or (cfg.in_memory == "auto" and fits):
        pixels = images.decoded(size, channels) if not slow else None
        if pixels is not None:
            return MemoryLoader(*common, pixels=pixels, augment=augment)
        if cfg.in_memory is True:
            reason = (
                f"data.augment: {', '.join(slow)}" if slow else "images of a dataset of your own"
            )
            raise Refused(f"data.in_memory: true cannot go with {reason}; say auto")
    return StreamLoader(*common, augment=augment, num_workers=cfg.num_workers)
