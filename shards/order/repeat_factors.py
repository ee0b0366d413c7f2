"""Repeat factors: samples with rare classes are visited more often.

The factors are those of LVIS (Gupta, Dollar, Girshick: "LVIS: A Dataset for Large Vocabulary Instance Segmentation",
2019, appendix B.2): if f(c) is the share of samples that have class c, and t a threshold, class c has the factor
r(c) = max(1, sqrt(t / f(c))), and a sample has the largest factor of its classes.

An epoch visits a sample a whole number of times: the factor is rounded up with its fraction as the probability, and
down otherwise. All roundings of an epoch are drawn together by systematic sampling (Madow: "On the theory of systematic
sampling", 1949): the cumulative sums of the factors of the samples, in a random order, are shifted by one random amount
and rounded down, and a sample is visited as often as the sum grows at it. The probabilities are exact, and the total
differs by at most one between epochs: the meaning of a position does not depend on the epochs before. Factors are
whole multiples of 2^-20, so all sums are exact.
"""

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import DatasetError
from shards.common.splitmix import fold, hashes
from shards.format.index import Index

UNIT = 2**20  # one visit, in the units in which factors are summed


def repeat_factors(index: Index, threshold: float) -> NDArray[np.float64]:
    """Return how often each sample is visited on average, float64 [N], at least 1.

    `threshold`, t, is above 0 and at most 1. If classes are selected, only these count. A DatasetError is raised if the
    index has no labels.
    """
    if index.labels is None:
        raise DatasetError("repeat factors need an index with labels, which this one does not have")
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


def rounded(units: NDArray[np.int64], key: np.uint64) -> NDArray[np.int64]:
    """Return how often each sample is visited in one epoch, int64 [N]: its factor, in `units`, rounded down or up."""
    order = np.argsort(hashes(np.arange(len(units)), fold(key, 1)))
    sums = (np.cumsum(units[order]) + int(fold(key, 2) % np.uint64(UNIT))) // UNIT
    visits = np.empty(len(units), dtype=np.int64)
    visits[order] = np.diff(sums, prepend=0)
    return visits
