"""Repeat factors: samples with rare classes come more often.

As LVIS has it (Gupta, Dollar, Girshick: "LVIS: A Dataset for Large Vocabulary Instance Segmentation", 2019, appendix
B.2): with f(c) the share of samples that have class c, and a threshold t, a class has the factor
r(c) = max(1, sqrt(t / f(c))), and a sample the largest factor of its classes.

Factors have fractions, and an epoch visits a sample a whole number of times: the factor rounded down or up, up with the
fraction as the probability. The roundings of one epoch are drawn together (Madow: "On the theory of systematic
sampling", 1949): the samples are put into a random order, their factors added up, and the sums, all moved by one random
amount, rounded down; a sample comes as often as its sum has grown. So the probabilities are exact, and the total is the
same in every epoch but for one, which independent roundings would not give: the length of an epoch, and with it the
meaning of a position, needs no sums over the epochs before. Factors are whole multiples of 2^-20, and all sums exact.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DatasetError
from shards.common.splitmix import fold, hashes
from shards.format.index import Index

UNIT = 2**20  # a visit, in units of factors


def repeat_factors(index: Index, threshold: float) -> NDArray[np.float64]:
    """(N,) how often each sample comes on average, at least 1.

    Args:
        index: with labels; where classes are selected, only these count.
        threshold: t, above 0 to 1. A class in fewer than this share of the samples is repeated.
    """
    if not 0 < threshold <= 1:
        raise DatasetError(f"repeat_threshold is {threshold}: it must be above 0 and at most 1")
    if index.labels is None:
        raise DatasetError("repeat factors need the labels of an index, which this one was left without")
    classes, samples = index.labels.classes, index.labels.samples
    if index.category_ids is not None:
        chosen = np.isin(classes, list(index.category_ids))
        classes, samples = classes[chosen], samples[chosen]
    share = np.bincount(classes) / max(len(index), 1)
    of_class = np.ones(len(share))
    present = share > 0
    of_class[present] = np.maximum(1, np.sqrt(threshold / share[present]))
    factors = np.ones(len(index))
    np.maximum.at(factors, samples, of_class[classes])
    return factors


def units_of_repeats(index: Index, threshold: float) -> NDArray[np.int64]:
    """(N,) the repeat factors in whole units."""
    return np.rint(repeat_factors(index, threshold) * UNIT).astype(np.int64)


def visits_of_an_epoch(units: NDArray[np.int64]) -> int:
    """How many samples every epoch visits at least; it may be one more."""
    return int(units.sum()) // UNIT


def rounded(units: NDArray[np.int64], key: np.uint64) -> NDArray[np.int64]:
    """(N,) how often each sample comes in one epoch: its factor rounded down or up.

    Args:
        units: (N,) factors in units.
        key: of the epoch's random numbers.
    """
    order = np.argsort(hashes(np.arange(len(units)), fold(key, 1)))
    sums = (np.cumsum(units[order]) + int(fold(key, 2) % np.uint64(UNIT))) // UNIT
    visits = np.empty(len(units), dtype=np.int64)
    visits[order] = np.diff(sums, prepend=0)
    return visits
