"""Batches of images and labels on the device, in the order and with the augmentations of an epoch.

The order of an epoch is a function of (seed, epoch). Everything random about an image is a function
of (seed, epoch, index of the image) and, where an image can come twice in an epoch, of its position
in the epoch. So a resumed run can start an epoch at any batch without reading the batches before
this one, and the batches are the same for any number of workers.
"""

import functools
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from multiprocessing.util import Finalize

import numpy as np
import torch
from torch.utils.data import DataLoader

from cnn.config import DataConfig
from cnn.datasets import workers
from cnn.datasets.augment import Augmentation
from cnn.datasets.images import Images
from cnn.datasets.order import EVALUATION, Key, draw_balanced, keys_of, share_of, split_epoch
from cnn.datasets.preprocessing import Form, Normalize, Preprocessing
from cnn.errors import BadImage, DataFailed, Refused
from cnn.utils import seeding

logger = logging.getLogger(__name__)

# Normalized images, float32 (N, C, H, W); labels, int64 (N); and how many of the first images count
# in gradients and metrics. All count, except in a process without a share (`order.share_of`).
Batch = tuple[torch.Tensor, torch.Tensor, int]

# One batch, or a process's share of it: its first position in the epoch, the position after its
# last image, and how many of its images count.
Span = tuple[int, int, int]

MEMORY_LIMIT = 2 * 2**30  # bytes of pixels that data.in_memory=auto keeps in memory
EVALUATION_BATCHES = 2  # training batches in an evaluation batch; 4 are slower on a CPU
LARGEST_EVALUATION_BATCH = 512


@dataclass
class Samples:
    """A dataset that turns a list of keys into a batch of images and labels, for a DataLoader.

    A key is (epoch, index of the image in the split). If an image can occur twice in an epoch, the
    key is (epoch, index, position in the epoch). Epoch 0 means evaluation, without augmentation.

    Attributes:
        images: the images of one split.
        form: the form of the pictures for evaluation.
        augmentation: makes batches of the pictures, which are augmented in training.
        seed: the seed of the run.
        normalize: normalizes the batches. If None, the batches stay as they are.
    """

    images: Images
    form: Form
    augmentation: Augmentation
    seed: int
    normalize: Normalize | None = None

    def raw(self, key: Key) -> torch.Tensor:
        """Returns an image before augmentation, (C, H, W), square unless a random box is cut.

        Args:
            key: (epoch, index of the image), or (epoch, index, position in the epoch).
        """
        if self.images.may_draw:
            seeding.seed_sample(self.seed, seeding.SAMPLE, *key)
        form = replace(self.form, margin=self.augmentation.needs_margin(key[0]))
        return self.images.picture(key[1], form)

    def image(self, key: Key) -> torch.Tensor:
        """Returns an image in the model's size, not normalized, (C, size, size).

        The image is augmented unless the epoch is 0. Epoch 0 means evaluation.

        Args:
            key: (epoch, index of the image), or (epoch, index, position in the epoch).
        """
        resized = self.augmentation.resize(self.raw(key), key)
        return self.augmentation.stack([resized], [key])[0]

    def __getitems__(self, keys: list[Key]) -> tuple[tuple, list[str]] | DataFailed:
        """Returns a batch, or the error that prevents the batch.

        The DataLoader calls this method, in a worker process if there are worker processes. The
        error is returned and not raised, since torch would add the worker's traceback to a raised
        error.

        Args:
            keys: one key per image, (epoch, index of the image) or (epoch, index, position in the
                epoch).

        Returns:
            ((images, labels), messages), with one message for each image that was left out. If the
            batch cannot be made, the error.
        """
        images, kept, left_out, name = [], [], [], "the next batch"
        try:
            for key in keys:
                name = self.images.name(key[1])
                try:
                    images.append(self.augmentation.resize(self.raw(key), key))
                    kept.append(key)
                except BadImage as bad:
                    if not self.images.skip:
                        raise
                    left_out.append(str(bad))
            # BatchNorm needs two images. Besides, a missing folder must not be left out bit by bit.
            if left_out and len(kept) < (1 if keys[0][0] == EVALUATION else 2):
                raise BadImage(f"{left_out[0]}, and so nearly all of its batch of {len(keys)}")
            name = "the next batch"
            labels = torch.from_numpy(self.images.labels[[key[1] for key in kept]])
            batch = self.augmentation.stack(images, kept)
            return (self.normalize(batch) if self.normalize else batch, labels), left_out
        except BadImage as bad:
            return DataFailed(f"{bad}; put the image back, and the run resumes at this batch")
        except (DataFailed, Refused) as error:
            return DataFailed(str(error))  # training has started, and it is too late to refuse
        except Exception as error:  # noqa: BLE001  an augmentation or dataset can raise anything
            return workers.data_failure(error, name)


@dataclass(eq=False)
class Loader:
    """A base class of loaders, which load batches of one split onto the device.

    In training, batches are shuffled and augmented. Each process loads a share of every training
    batch. In evaluation, each batch is loaded whole by one of the processes, in turn.

    The methods `raw` and `image` are those of `Samples`. A subclass must define the method
    `_batches`. `_batches(epoch, spans, start)` yields one batch per span. A span is (first
    position, end position, number of images that count). `start` is the index of the first batch to
    yield.

    Args:
        images: the images of the split.
        preprocessing: image size, channels, mean and std for the model.
        batch_size: images per batch, in all processes together.
        device: the device to load the batches onto.
        seed: the seed of the run.
        sampler: "shuffle", or "balanced" to draw all classes with equal probability.
        augmentation: resizes the images, and augments the images in training.
        rank: the rank of this process, from 0 on.
        num_ranks: the number of processes.
        drop_last: whether a last batch that is not full is left out.

    Attributes:
        sizes: number of images in each batch of an epoch, in all processes together.
        starts: first position of each batch in the epoch, and at the end that of the images
            in batches.
    """

    images: Images
    preprocessing: Preprocessing
    batch_size: int
    device: torch.device
    seed: int
    sampler: str
    augmentation: Augmentation
    rank: int
    num_ranks: int
    drop_last: bool

    def __post_init__(self):
        self.balanced = self.sampler == "balanced"
        self.sizes = split_epoch(len(self.images), self.batch_size, drop_last=self.drop_last)
        self.starts = np.cumsum([0, *self.sizes]).tolist()
        self._normalize = Normalize(self.preprocessing, self.device)
        # A GPU normalizes, which quarters the bytes copied to it; for a CPU the workers do it.
        normalize = self._normalize if self.device.type == "cpu" else None
        form = self.preprocessing.form
        self._samples = Samples(self.images, form, self.augmentation, self.seed, normalize)
        self.raw, self.image = self._samples.raw, self._samples.image

    def __len__(self) -> int:
        return len(self.sizes)

    def num_batches_per_rank(self) -> int:
        """Returns the largest number of evaluation batches that one process loads.

        The processes divide the batches of an evaluation. Some processes can have one batch fewer
        than the others.
        """
        return -(-len(self.sizes) // self.num_ranks)

    def train_batches(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """Yields this process's share of each training batch of an epoch.

        Args:
            epoch: the epoch, counted from 1.
            start: index of the first batch to yield, from 0 on. Earlier batches are not read.

        Yields:
            Three values. The first value contains N normalized images, float32 (N, C, H, W). The
            second value contains the N labels, int64 (N). The third value is how many images count
            in gradients and metrics. The third value is 0 if the batch is too small for this
            process to have a share. Otherwise, the third value is N.
        """
        shares = [share_of(size, self.rank, self.num_ranks) for size in self.sizes]
        spans = [(at + first, at + end, n) for at, (first, end, n) in zip(self.starts, shares)]
        return self._batches(epoch, spans[start:], start)

    def batches(self) -> Iterator[Batch]:
        """Yields the batches that this process evaluates.

        The images are in the order of the dataset and not augmented. The processes take the batches
        in turn.

        Yields:
            Three values. The first value contains N normalized images, float32 (N, C, H, W). The
            second value contains the N labels, int64 (N). The third value is N, the number of
            images that count in the metrics.
        """
        spans = [(start, start + size, size) for start, size in zip(self.starts, self.sizes)]
        spans = spans[self.rank :: self.num_ranks]
        return self._batches(EVALUATION, spans, 0)

    def order(self, epoch: int) -> np.ndarray:
        """Returns the index of the image at each position of an epoch.

        The order depends only on the data, the sampler, the seed of the run and the epoch. An
        evaluation takes the images in the order of the dataset.

        Args:
            epoch: the epoch. Epoch 0 means evaluation.

        Returns:
            Indices, int64, one per image of the epoch.
        """
        if epoch == EVALUATION:
            return np.arange(len(self.images))
        rng = np.random.default_rng(seeding.mix(self.seed, seeding.ORDER, epoch))
        if self.balanced:
            return draw_balanced(self.images.labels, rng)
        return rng.permutation(len(self.images))

    def keys(self, epoch: int, batch: int) -> list[Key]:
        """Returns the keys of the images in one batch, in all processes together.

        A key seeds everything random about an image.

        Args:
            epoch: the epoch. Epoch 0 means evaluation.
            batch: index of the batch in the epoch, from 0 on.

        Returns:
            One key per image, (epoch, index of the image). In training with the balanced sampler, a
            key is (epoch, index of the image, position in the epoch).
        """
        start, end = self.starts[batch : batch + 2]
        return keys_of(epoch, self.order(epoch), self.balanced, start, end)


class _Plan:
    """A batch sampler that gives a DataLoader a list of image keys per batch.

    A key is (epoch, index of the image) or (epoch, index, position in the epoch). The attributes
    must be set before every epoch.

    Attributes:
        keys: a function that returns the keys of the images at successive positions of the epoch.
            The two arguments of the function are the first position and the position after the last
            one.
        spans: for each batch, (first position, end position, number of images that count).
    """

    keys: Callable[[int, int], list[Key]]
    spans: list[Span]

    def __iter__(self) -> Iterator[list[Key]]:
        return (self.keys(start, end) for start, end, _ in self.spans)


class StreamLoader(Loader):
    """A loader that reads the images one by one, in worker processes.

    Args:
        *args: the positional arguments of the base class `Loader`, such as the images.
        num_workers: number of worker processes. If 0, this process reads the images.
    """

    def __init__(self, *args, num_workers: int):
        super().__init__(*args)
        self._finish = self._normalize if self._samples.normalize is None else lambda batch: batch
        self._plan = _Plan()
        Finalize(None, workers.kill_workers, exitpriority=0)  # runs when this process ends
        self._loader = DataLoader(
            self._samples,
            batch_sampler=self._plan,
            collate_fn=workers.pickle_batch if num_workers else lambda batch: batch,
            num_workers=num_workers,
            persistent_workers=num_workers > 0,
            worker_init_fn=workers.init_worker,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # the DataLoader draws a seed, which nothing here uses
        )

    def _batches(self, epoch: int, spans: list[Span], start: int) -> Iterator[Batch]:
        # A partial without self: a reference cycle would keep the workers until it is collected.
        self._plan.keys = functools.partial(keys_of, epoch, self.order(epoch), self.balanced)
        self._plan.spans = spans
        where = "the evaluation" if epoch == EVALUATION else f"epoch {epoch}"
        received = workers.receive_batches(self._loader, start + 1, where)
        for ((images, labels), left_out), (_, _, count) in zip(received, spans):
            for message in left_out:
                logger.warning("%s; left out of its batch (data.on_bad_image=skip)", message)
            yield (
                self._finish(images.to(self.device, non_blocking=True)),
                labels.to(self.device, non_blocking=True),
                min(count, len(labels)),
            )


class MemoryLoader(Loader):
    """A loader that keeps all images of a dataset in the device's memory.

    Args:
        *args: the positional arguments of the base class `Loader`, such as the images.
        store: M pictures, uint8 (M, size, size, C).
        rows: the index of each image in `store`, int64 (N).
    """

    def __init__(self, *args, store: torch.Tensor, rows: np.ndarray):
        super().__init__(*args)
        self._store = store.to(self.device)
        self._rows = torch.from_numpy(rows).to(self.device)
        self._labels = torch.from_numpy(self.images.labels).to(self.device)

    def _batches(self, epoch: int, spans: list[Span], _start: int) -> Iterator[Batch]:
        order = self.order(epoch)
        on_device = torch.from_numpy(order).to(self.device)
        for begin, end, count in spans:
            indices, keys = on_device[begin:end], keys_of(epoch, order, self.balanced, begin, end)
            at = slice(begin, end) if self.balanced else indices
            images = self.augmentation.gather(self._store, self._rows[indices], at, keys)
            yield self._normalize(images), self._labels[indices], count


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
    """Builds a loader for the batches of one split.

    The loader keeps all pixels in memory or reads image by image. The choice depends only on the
    settings and the data, never on the machine.

    Args:
        cfg: the section `data` of the settings.
        images: the images of the split.
        preprocessing: image size, channels, mean and std for the model.
        device: the device to load the batches onto.
        seed: the seed of the run.
        training: whether the loader is for training. A loader for evaluation does not augment, and
            the batches can be larger.
        rank: the rank of this process, from 0 on.
        num_ranks: the number of processes.

    Raises:
        Refused: an image file can no longer be decoded. Or `cfg.in_memory` is true, but the images
            cannot be kept in memory. Or an augmentation cannot be built. Or `cfg.drop_last` leaves
            no batch.
    """
    batch_size = cfg.batch_size
    if training and cfg.drop_last and len(images) < batch_size:
        few = f"{len(images)} training images are no full batch of {batch_size}"
        raise Refused(f"data.drop_last: {few}; a smaller data.batch_size, or say false")
    if not training:  # not too large, so that every process has batches to evaluate
        batch_size = min(EVALUATION_BATCHES * batch_size, max(batch_size, LARGEST_EVALUATION_BATCH))
    form = preprocessing.form
    augmentation = Augmentation(cfg.augment if training else [], images, form.size, seed)
    common = (images, preprocessing, batch_size, device, seed, cfg.sampler, augmentation)
    common += (rank, num_ranks, training and cfg.drop_last)
    form = replace(form, margin=augmentation.needs_margin(int(training)))
    if _is_in_memory(cfg, images, form, augmentation):
        if form.margin:
            return StreamLoader(*common, num_workers=0 if images.is_kept(form) else cfg.num_workers)
        store, rows = images.store(form)
        return MemoryLoader(*common, store=store, rows=rows)
    return StreamLoader(*common, num_workers=cfg.num_workers)


def _is_in_memory(cfg: DataConfig, images: Images, form: Form, augmentation: Augmentation) -> bool:
    if cfg.in_memory is True and not images.num_decoded:
        raise Refused("data.in_memory: true cannot go with a dataset of your own; say auto")
    # Worker processes make the same batches; they are worth their start for slow augmentations.
    num_bytes = images.num_decoded * form.size**2 * form.channels * (2 if form.margin else 1)
    fits = num_bytes <= MEMORY_LIMIT and not (augmentation.is_slow and cfg.num_workers)
    return images.num_decoded > 0 and (cfg.in_memory is True or (cfg.in_memory == "auto" and fits))
