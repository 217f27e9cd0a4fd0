"""Randomness without state: every draw is a function of the seed and of where in the run it is.

The order of an epoch depends on (seed, epoch), what is random about a training image on (seed,
epoch, index of the image, name of the change) and, where an image may come twice, its place in the
epoch; what is random inside a step on (seed, step), and inside an evaluation on (seed, epoch,
batch). No generator has to be saved, and any number of loader processes draws the same.
"""

import random

import numpy as np
import torch

# What a draw is for; keeps, say, step 3's dropout and epoch 3's order apart.
INIT, ORDER, SAMPLE, STEP, SPLIT, EVALUATE, AUGMENT = range(1, 8)

_MASK = 2**64 - 1


def mix(*words: int) -> int:
    """Hashes integers to one of 63 bits (SplitMix64; Steele, Lea, Flood, OOPSLA 2014)."""
    state = 0
    for word in words:
        state = (state ^ (word & _MASK)) + 0x9E3779B97F4A7C15 & _MASK
        state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
        state = (state ^ (state >> 27)) * 0x94D049BB133111EB & _MASK
        state ^= state >> 31
    return state >> 1


def generator(*words: int) -> torch.Generator:
    """A generator of its own, on the CPU, keyed by the words."""
    return torch.Generator().manual_seed(mix(*words))


def seed_torch(*words: int) -> None:
    """Keys torch's global generator on the CPU."""
    torch.default_generator.manual_seed(mix(*words))  # torch.manual_seed is 60 times slower


def seed_sample(*words: int) -> None:
    """Keys the global generators of torch, numpy and Python, for whichever is drawn from."""
    key = mix(*words)
    torch.default_generator.manual_seed(key)
    random.seed(key)
    np.random.seed(key & 0xFFFFFFFF)


def seed_step(device: torch.device, *words: int) -> None:
    """Keys the global generators and the device's, so that dropout depends on the words alone."""
    seed_sample(*words)
    if device.type == "cuda":
        torch.cuda.manual_seed(mix(*words))
    elif device.type == "mps":
        torch.mps.manual_seed(mix(*words))
