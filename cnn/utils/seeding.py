"""Randomness without state: every draw is a function of the seed and of the position in the run.

The order of the images in an epoch depends on (seed, epoch). The augmentation of an image depends
on (seed, epoch, index of the image, name of the augmentation), and also on the position in the
epoch if an image may occur twice. Dropout and other random layers depend on (seed, step) in
training and on (seed, epoch, batch) in an evaluation. Therefore no checkpoint needs the state of a
generator, and the draws do not depend on the number of loader processes.
"""

import random

import numpy as np
import torch

# The purpose of a draw is hashed too, so that step 3's dropout and epoch 3's order differ.
INIT, ORDER, SAMPLE, STEP, SPLIT, EVALUATE, AUGMENT = range(1, 8)

_MASK = 2**64 - 1


def mix(*words: int) -> int:
    """Hashes integers to one integer of 63 bits (SplitMix64; Steele, Lea, Flood, OOPSLA 2014).

    Args:
        words: the integers, for example the seed, the purpose of a draw such as STEP, and the index
            of the step.
    """
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def seed_torch(*words: int) -> None:
    """Seeds PyTorch's global CPU generator with a hash of integers.

    Args:
        words: the integers, for example the seed, the epoch and the index of an image.
    """
    torch.default_generator.manual_seed(mix(*words))  # torch.manual_seed is 60 times slower


def seed_sample(*words: int) -> None:
    """Seeds the global CPU generators of PyTorch, numpy and Python with a hash of integers.

    Args:
        words: the integers, for example the seed, the purpose SAMPLE, the epoch and the index of an
            image.
    """
    key = mix(*words)
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


def seed_step(device: torch.device, *words: int) -> None:
    """Seeds all random generators of a forward pass with a hash of integers.

    These are the global generators of PyTorch, numpy and Python, and PyTorch's generator on the
    device. Random layers such as dropout draw the same numbers in the next forward pass whenever
    the integers are the same.

    Args:
        device: the device of the model.
        words: the integers, for example the seed, the purpose STEP and the index of the step.
    """
    seed_sample(*words)
    if device.type == "cuda":
        torch.cuda.manual_seed(mix(*words))
    elif device.type == "mps":
        torch.mps.manual_seed(mix(*words))
