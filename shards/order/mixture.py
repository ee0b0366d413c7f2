"""Several datasets in given proportions, exact and resumable at one position.

Every global batch takes its share of each dataset by arithmetic on its position: no drawing, so the proportions hold
in any stretch of the run to within a few samples a lane (`apportion`), and any position can be computed at once. Each
dataset runs through epochs of its own, in the order of `shards.order.epoch_order`, and begins the next when one ends
(a batch may
then hold a sample of both).

The row of batches is cut into lanes here too: batch G comes from lane G mod lanes of every dataset.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np
from numpy.typing import NDArray

from shards.common.argument_checks import real
from shards.common.errors import DatasetError
from shards.common.splitmix import fold
from shards.common.text import shown
from shards.format.dataset import Category, Dataset
from shards.format.index import Index
from shards.order.epoch_order import Order, OrderSettings


@dataclass(frozen=True)
class Mix:
    """Datasets and their weights: a `ShardStream` takes one in place of a dataset.

    The classes must be the same, by name. Where their ids differ, samples come with the ids of the first dataset.

    Attributes:
        datasets: at least one, opened, with a subset selected or not.
        weights: of the samples of each, in any unit, above 0: (3, 1) or (0.75, 0.25) alike.

    Raises:
        DatasetError: as many weights as datasets are needed, all above 0, and the same classes.
    """

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        if not isinstance(datasets, Iterable) or not isinstance(weights, Iterable):
            raise DatasetError("a mix needs a list of datasets and one of weights: Mix([one, other], [3, 1])")
        object.__setattr__(self, "datasets", tuple(datasets))
        object.__setattr__(self, "weights", tuple(weights))
        if not self.datasets or len(self.datasets) != len(self.weights):
            raise DatasetError(
                f"a mix of {len(self.datasets)} datasets with {len(self.weights)} weights: give one each"
            )
        for dataset, weight in zip(self.datasets, self.weights):
            if not isinstance(dataset, Dataset):
                raise DatasetError(f"a mix holds {shown(dataset)}: give what open_dataset returns")
            real(f"{dataset.root}: its weight in the mix", weight)
            if not weight > 0 or weight == float("inf"):
                raise DatasetError(f"{dataset.root}: its weight in the mix is {weight}: it must be a number above 0")
            _check_classes(self.datasets[0], dataset)

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, under the ids with which samples come."""
        return self.datasets[0].categories

    def indexes(self, split: str) -> tuple[Index, ...]:
        """The split's index of each dataset.

        Raises:
            DatasetError: one of them has no such split, or no sample in it.
        """
        ids = {category.name: category.id for category in self.categories}
        found = []
        for dataset in self.datasets:
            index = dataset.index(split)
            if len(index) == 0:
                raise DatasetError(f"{dataset.root}: split {split!r} has no sample to mix: leave the dataset out")
            mapping = {category.id: ids[category.name] for category in dataset.categories}
            if any(before != after for before, after in mapping.items()):
                index = replace(index, category_ids=mapping)
            found.append(index)
        return tuple(found)


class MixedOrder:
    """The endless row of global batches over several splits; see `Order`.

    Attributes:
        settings: what decides the order, beside the indexes and the weights.
        lanes: as asked for, but so few that a lane of every split holds its share of two batches.

    Raises:
        DatasetError: images are to be grouped, which needs batches of one dataset.
    """

    def __init__(self, indexes: Sequence[Index], weights: Sequence[float], settings: OrderSettings) -> None:
        if settings.group_by_aspect:
            raise DatasetError("order: group_by_aspect needs a single dataset: leave it off for a mix")
        self.settings = settings
        self.weights = whole_weights(weights)
        shares = [-(-settings.batch_size * weight // sum(self.weights)) for weight in self.weights]
        self.lanes = max(1, min([settings.lanes, *(len(i) // (2 * share) for i, share in zip(indexes, shares))]))
        self._orders = [
            Order(index, replace(settings, batch_size=1, lanes=self.lanes, seed=int(fold(settings.seed, number))))
            for number, index in enumerate(indexes)
        ]

    @property
    def indexes(self) -> tuple[Index, ...]:
        """The index of each dataset, without labels."""
        return tuple(order.index for order in self._orders)

    @property
    def batches_per_epoch(self) -> int:
        """Batches that hold as many samples as an epoch of every dataset together: a measure, not a boundary."""
        return max(1, sum(order.visits for order in self._orders) // self.settings.batch_size)

    def identity(self) -> dict[str, Any]:
        """All that decides the order. A position G means the same only under an equal identity."""
        fingerprints = [order.fingerprint for order in self._orders]
        return {**asdict(self.settings), "index": fingerprints, "weights": list(self.weights)}

    def epoch_of(self, position: int) -> int:
        """How often as many samples were read, before this batch, as the datasets have together."""
        return position // self.batches_per_epoch

    def visit(self, position: int) -> int:
        """A number that no two batches with the same sample share: the position."""
        return position

    def sizes(self, position: int) -> tuple[int, ...]:
        """How many samples of each dataset are in global batch `position`."""
        return tuple(stop - start for start, stop in self._spans(position))

    def rows(self, position: int, number: int) -> NDArray[np.int64]:
        """The rows of the index of dataset `number` that are in global batch `position`."""
        return self._orders[number].endless_lane(position % self.lanes, *self._spans(position)[number])

    def _spans(self, position: int) -> list[tuple[int, int]]:
        """From which to which sample of its lane each dataset gives to a batch."""
        turn, lane = divmod(position, self.lanes)
        # Lanes begin at different places of the pattern: else all of them would take a rare dataset at the same time.
        phase = lane * sum(self.weights) // self.lanes
        size = self.settings.batch_size
        begin, start, stop = (apportion(phase + taken, self.weights) for taken in (0, turn * size, (turn + 1) * size))
        return [(first - zero, last - zero) for zero, first, last in zip(begin, start, stop)]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """The smallest whole numbers in the same proportion; a weight is meant as it is written: 0.1 is a tenth."""
    exact = [Fraction(str(weight)).limit_denominator(10**6) for weight in weights]
    whole = [int(weight * lcm(*(w.denominator for w in exact))) for weight in exact]
    common = int(np.gcd.reduce(whole))
    if min(whole) < 1:
        raise DatasetError(f"weights of a mix {tuple(weights)}: the smallest is below a millionth: leave it out")
    return tuple(number // common for number in whole)


def apportion(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """How many of the first `total` samples come from each dataset.

    Each takes its share, rounded down, of what those before it have left. So the numbers add up to `total`, and none
    of them ever falls when `total` grows: sample number `total` belongs to the one that grows next. What rounding left
    over adds up on the way, so that the last of n numbers may be up to n - 1 off its share, and none more.

    Args:
        total: not negative.
        weights: whole numbers above 0.
    """
    counts = []
    left, weight_left = total, sum(weights)
    for weight in weights:
        counts.append(left * weight // weight_left)
        left, weight_left = left - counts[-1], weight_left - weight
    return tuple(counts)


def _check_classes(first: Dataset, other: Dataset) -> None:
    ours, theirs = ({category.name for category in dataset.categories} for dataset in (first, other))
    for names, without in ((ours - theirs, other), (theirs - ours, first)):
        if names:
            raise DatasetError(
                f"{without.root}: it has no class {', '.join(sorted(names))}, which is in the mix: objects without a "
                "label would be taught as background; choose the classes that all have, dataset.select(classes=...)"
            )
