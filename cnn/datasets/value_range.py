"""The values of images with more than 8 bits: their range, and how they become bytes."""

import numpy as np

from cnn.errors import BadImage

# How values of more than 8 bits become bytes: [low, high] for the values that become black and
# white. None is for models that were trained on images of 8 bits: integers are those of 16 bits,
# and floats are refused. PER_IMAGE is for the models of earlier versions.
ValueRange = list[float] | str | None
PER_IMAGE = "per image"
MAX_OF_16_BITS = 2**16 - 1

# What the values of images with more than 8 bits can be made to fill: integers or floats of all
# usual numbers of bits, from the smallest range to the largest.
FULL_RANGES = [(0, 1), (-1, 1), *((0, 2**bits - 1) for bits in (8, 10, 12, 14, 16))]
FULL_RANGES += [(-(2**15), 2**15 - 1), (0, 2**32 - 1)]

LEVELS = (0, 0.02, 0.9, 0.98, 1)  # shares of the pixels of an image
HUGE = 1e30  # values beyond stand for pixels without a value, as do NaN and infinity


def levels_of(values: np.ndarray) -> np.ndarray:
    """Returns the values of an image at the shares `LEVELS` of the sorted pixels, (5).

    Args:
        values: the values, float64 (H, W) or (H, W, C). If C is 2 or 4, the last channel is alpha,
            which does not count.

    Raises:
        BadImage: all values are NaN or infinite.
    """
    colors = values[..., :-1] if _has_alpha(values) else values
    finite = colors[np.abs(colors) < HUGE]
    if not len(finite):
        raise BadImage("no pixel has a finite value")
    return np.quantile(finite, LEVELS, method="nearest")


def range_of_levels(levels: np.ndarray) -> list[float]:
    """Returns the range that the values of images fill.

    The range covers the middle 96 % of the pixels of an image, for all images but the 5 % with the
    darkest and the brightest values. Where the brightest 2 % of the pixels have one value, the
    brightest 10 % do not count either. So a label burned into the images does not determine the
    range. If a range fills a quarter of one of FULL_RANGES, the full range is returned instead. So
    the same images give the same pixels, whatever the number of bits.

    Args:
        levels: the values of each image at the shares `LEVELS` of the pixels, (N, 5).
    """
    # All pixels count if the images are nearly empty, and all images if there are only a few.
    lowest, dark, light, bright, highest = levels.T
    bright = np.where(bright == highest, light, bright)
    for lows, highs, share in ((dark, bright, 0.05), (lowest, highest, 0.05), (lowest, highest, 0)):
        low = np.quantile(lows, share, method="higher").item()
        high = np.quantile(highs, 1 - share, method="lower").item()
        if low < high:
            break
    around = [full for full in FULL_RANGES if full[0] <= low and high <= full[1]]
    if around and high - low > (around[0][1] - around[0][0]) / 4:
        low, high = around[0]
    return [low, high]


def to_bytes(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Converts values of more than 8 bits to bytes, 0 for black to 255 for white.

    Args:
        values: integers or floats, (H, W) or (H, W, C). If C is 2 or 4, the last channel is alpha,
            which does not depend on the range.
        value_range: the values that become black and white. NaN becomes black.

    Returns:
        Bytes, uint8 of the same shape.

    Raises:
        BadImage: the range is None, and the values are floats.
    """
    if _has_alpha(values):
        parts = (values[..., :-1], value_range), (values[..., -1:], PER_IMAGE)
        return np.concatenate([to_bytes(*part) for part in parts], axis=2)
    if value_range is None and values.dtype.kind == "f":
        raise BadImage("float values, and the model was trained on images of 8 bits")
    if not isinstance(value_range, list):
        return _to_bytes_per_image(values)
    low, high = value_range
    shares = (values.astype(np.float64).clip(low, high) - low) / ((high - low) or 1)
    return np.rint(np.nan_to_num(shares) * 255).astype(np.uint8)


def _to_bytes_per_image(values: np.ndarray) -> np.ndarray:
    """Converts values to bytes without a range of the dataset.

    Integers of more than 8 bits are clipped to 0..65535 and divided by 256. Floats are multiplied
    by 255 if all floats of the image are in 0..1. Other floats are clipped to 0..255.
    """
    if values.dtype.itemsize == 1:
        return values.view(np.uint8)
    if values.dtype.kind != "f":
        return (values.astype(np.int64).clip(0, MAX_OF_16_BITS) >> 8).astype(np.uint8)
    values = np.nan_to_num(values, nan=0.0)
    if values.min() >= 0 and values.max() <= 1:
        values = values * 255
    return np.round(values.clip(0, 255)).astype(np.uint8)


def _has_alpha(values: np.ndarray) -> bool:
    return values.ndim == 3 and values.shape[2] in (2, 4)
