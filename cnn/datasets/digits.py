"""1,797 handwritten digits, 8 x 8 pixels, gray: a dataset within the package, without a download.

E. Alpaydin, C. Kaynak: Optical Recognition of Handwritten Digits, UCI Machine Learning Repository,
1998, https://doi.org/10.24432/C50P49, CC BY 4.0. These are the images that scikit-learn's
`load_digits` returns, in the same order. The first half is for training, the second for testing,
not shuffled: most writers of one half are not in the other, and a shuffled split would raise the
accuracy by 2 to 4 points.
"""

from pathlib import Path

import numpy as np

from cnn.datasets.images import ArrayImages

FILE = Path(__file__).with_name("digits.npz")
NUM_TRAIN = 898


def load() -> tuple[dict[str, ArrayImages], list[str]]:
    """Reads the dataset of handwritten digits, with training and test images.

    Returns:
        Two values. The first value is a dict with 898 images under "train" and 899 images under
        "test". The second value is a list of the class names, "0" to "9".
    """
    with np.load(FILE) as file:
        labels = file["labels"]
        pixels = np.round(file["images"] * (255 / 16)).astype(np.uint8)  # 0..16 in the source
    images = ArrayImages(pixels[:, None], labels, "digits")
    train, test = np.split(np.arange(len(labels)), [NUM_TRAIN])
    splits = {"train": images.subset(train), "test": images.subset(test)}
    return splits, [str(digit) for digit in range(10)]
