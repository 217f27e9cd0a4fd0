"""Temperature scaling (Guo et al., ICML 2017): probabilities that are right as often as they say.

The logits are divided by one number, the temperature, before the softmax. No prediction changes.
"""

import numpy as np

from cnn.metrics.scores import log_loss

SPREAD = 0.7  # standard deviation of the logarithm of the temperature, before anything is known
LEAST_GAIN = 4.0  # of the log-likelihood; twice what the 95 % quantile of the ratio asks for
FARTHEST = 4 * SPREAD
HALVINGS = 40  # of the interval that contains the temperature
TINY = np.finfo(np.float32).tiny


def fit_temperature(
    labels: np.ndarray, probabilities: np.ndarray, groups: np.ndarray | None = None
) -> float:
    """Returns the most probable temperature, by validation images.

    The logarithm of the temperature has a normal distribution beforehand, so that images that are
    all predicted correctly do not ask for probabilities of 1.

    Args:
        labels: the index of the true class of each image (N).
        probabilities: the probability of each class for each image (N, classes), without scaling.
        groups: the name of the group of each image (N). None if images are independent.

    Returns:
        The temperature. It is 1 unless the gain of the log-likelihood is at least `LEAST_GAIN`, or
        as much more as the images of a group are alike (Kish, 1965).
    """
    logs = np.log(np.maximum(probabilities.astype(np.float64), TINY))
    of_labels = logs[np.arange(len(labels)), labels]

    def slope(log: float) -> np.ndarray:  # of each image's loss, by the inverse of the temperature
        return (_softmax(logs * np.exp(-log)) * logs).sum(1) - of_labels

    low, high = -FARTHEST, FARTHEST
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        rises = middle / SPREAD**2 > slope(middle).sum() * np.exp(-middle)
        low, high = (low, middle) if rises else (middle, high)
    found, gaps, effect = float(np.exp(low)), slope(0.0), 1.0
    before, after = (log_loss(labels, scaled(probabilities, each)) for each in (1.0, found))
    if groups is not None and gaps.any():
        sums = np.bincount(np.unique(groups, return_inverse=True)[1], gaps)
        effect = max(1.0, (sums**2).sum() / (gaps**2).sum())
    return found if (before - after) * len(labels) > LEAST_GAIN * effect else 1.0


def scaled(probabilities: np.ndarray, temperature: float) -> np.ndarray:
    """Returns probabilities (N, classes) as they are with a temperature."""
    if temperature == 1:
        return probabilities
    logs = np.log(np.maximum(probabilities.astype(np.float64), TINY))
    return _softmax(logs / temperature).astype(probabilities.dtype)


def _softmax(logits: np.ndarray) -> np.ndarray:
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)
