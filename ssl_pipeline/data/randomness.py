"""The only source of randomness in the data: counter-based, so that every number is a pure function of its key.

numpy's Philox (Salmon et al. 2011, Random123) maps a 128-bit key and a 256-bit counter to random bits. The key holds
(seed, purpose), the counter (epoch, view, sample id): no state passes from one draw to the next, so the pictures do not
depend on the number of ranks, the batch size, the order of reading, or on restarts.
"""

from __future__ import annotations

from enum import IntEnum

import numpy as np


class Purpose(IntEnum):
    """What a stream of numbers is for; streams of different purposes are independent."""

    ORDER = 1
    AUGMENTATION = 2
    REPLACEMENT = 3
    PROBE = 4
    SUBSET = 5


def generator(seed: int, purpose: Purpose, *counter: int) -> np.random.Generator:
    """The stream of key (seed, purpose) that starts at `counter`, up to three numbers of 64 bits."""
    words = np.zeros(4, dtype=np.uint64)
    words[1 : 1 + len(counter)] = counter  # the lowest word counts the blocks drawn from this stream
    return np.random.Generator(np.random.Philox(counter=words, key=np.array([seed, purpose], dtype=np.uint64)))


def permutation(seed: int, epoch: int, count: int, rollbacks: int = 0) -> np.ndarray:
    """The order of samples in an epoch, (count,) int64; another one after each of a run's `rollbacks`."""
    return generator(seed, Purpose.ORDER, epoch, 0, rollbacks).permutation(count)


def windowed_permutation(seed: int, epoch: int, shards: np.ndarray, window: int, rollbacks: int = 0) -> np.ndarray:
    """An order of samples, (N,) int64, that reads few shards at a time: `shards` (N,) is the shard of each sample.

    The shards are put into a random order and cut into windows of `window` (the last one may have fewer); within each
    window all samples are in random order. Every sample once; a function of (seed, epoch, rollbacks) and the shards alone.
    """
    draws = generator(seed, Purpose.ORDER, epoch, 1, rollbacks)
    count = int(shards.max(initial=-1)) + 1
    place = np.empty(count, dtype=np.int64)
    place[draws.permutation(count)] = np.arange(count)
    return np.lexsort((draws.random(len(shards)), place[shards] // window))


def uniforms(seed: int, epoch: int, samples: np.ndarray, view: int, count: int) -> np.ndarray:
    """Numbers in [0, 1) for one view of each sample, (N, count) float64."""
    draws = np.empty((len(samples), count))
    for row, sample in zip(draws, samples, strict=True):
        generator(seed, Purpose.AUGMENTATION, int(sample), view, epoch).random(out=row)
    return draws


def replacement(seed: int, epoch: int, sample: int, attempt: int, count: int) -> int:
    """The sample, below `count`, that stands in for an unreadable one."""
    return int(generator(seed, Purpose.REPLACEMENT, sample, attempt, epoch).integers(count))


def balanced_subset(seed: int, labels: np.ndarray, fraction: float) -> np.ndarray:
    """Places, ascending, of `fraction` of each class of labels (N,), rounded, at least one: keyed by (seed, class)."""
    chosen = []
    for label in np.unique(labels):
        places = np.flatnonzero(labels == label)
        order = generator(seed, Purpose.SUBSET, int(label)).permutation(len(places))
        chosen.append(places[order[: max(1, round(fraction * len(places)))]])
    return np.sort(np.concatenate(chosen))
