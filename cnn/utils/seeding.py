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
INIT, ORDER, SAMPLE, STEP, SPLIT, EVALUATE, AUGMENT, MIX = range(1, 9)

_MASK = 2**64 - 1


def mix(*words: int) -> int:
    """Hashes integers to one integer of 63 bits.

    The hash is SplitMix64 (Steele, Lea, Flood, OOPSLA 2014).

    Args:
        words: the integers, for example the seed of the run, the constant STEP, and the index of
            the step. STEP keeps the hash apart from hashes for other purposes.
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
        words: the integers, for example the seed of the run, the epoch and the index of an image.
    """
    torch.default_generator.manual_seed(mix(*words))  # torch.manual_seed is 60 times slower


def seed_sample(*words: int) -> None:
    """Seeds the global CPU generators of PyTorch, numpy and Python.

    The seed is a hash of the given integers.

    Args:
        words: the integers, for example the seed of the run, the constant SAMPLE, the epoch, and
            the index of an image. SAMPLE keeps the drawn numbers apart from numbers for other
            purposes.
    """
    key = mix(*words)
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


def seed_step(device: torch.device, *words: int) -> None:
    """Seeds all random generators that a forward pass can use.

    The generators are the global ones of PyTorch, numpy and Python, and PyTorch's generator on the
    device. With the same integers, random layers such as dropout draw the same numbers.

    Args:
        device: the device of the model.
        words: the integers, for example the seed of the run, the constant STEP, and the index of
            the step. STEP keeps the drawn numbers apart from numbers for other purposes.
    """
    seed_sample(*words)
    if device.type == "cuda":
        torch.cuda.manual_seed(mix(*words))
    elif device.type == "mps":
        torch.mps.manual_seed(mix(*words))
