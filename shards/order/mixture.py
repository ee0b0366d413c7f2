"""Several datasets in given proportions, exact and resumable at one position.

The share of each dataset in a global batch is computed from its position and not drawn at random: the proportions hold
in any stretch of the run to within a few samples per lane (`apportion`). Each dataset runs through its own epochs, in
the order of `shards.order.epoch_order`, and starts the next one when one ends (a batch may then hold samples of both).
Batch G comes from lane G mod lanes of every dataset.
"""

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

    Attributes:
        datasets: at least one opened dataset, whole or a subset. All must have the same classes, by name; if the ids
            differ, samples have the ids of the first dataset.
        weights: the relative number of samples of each dataset, above 0: (3, 1) is the same as (0.75, 0.25).

    Raises:
        DatasetError: the numbers of weights and datasets differ, a weight is not above 0, or the classes differ.
    """

    datasets: tuple[Dataset, ...]
    weights: tuple[float, ...]

    def __init__(self, datasets: Sequence[Dataset], weights: Sequence[float]) -> None:
        if not isinstance(datasets, Iterable) or not isinstance(weights, Iterable):
            raise DatasetError("a mix needs a list of datasets and one of weights: Mix([one, other], [3, 1])")
        object.__setattr__(self, "datasets", tuple(datasets))
        object.__setattr__(self, "weights", tuple(weights))
        if not self.datasets or len(self.datasets) != len(self.weights):
            mix = f"a mix of {len(self.datasets)} datasets with {len(self.weights)} weights"
            raise DatasetError(f"{mix}: give one weight per dataset")
        for dataset, weight in zip(self.datasets, self.weights):
            if not isinstance(dataset, Dataset):
                raise DatasetError(f"a mix holds {shown(dataset)}: give what open_dataset returns")
            real(f"{dataset.root}: its weight in the mix", weight)
            if not weight > 0 or weight == float("inf"):
                raise DatasetError(f"{dataset.root}: its weight in the mix is {weight}: it must be a number above 0")
            _check_classes(self.datasets[0], dataset)

    @property
    def categories(self) -> tuple[Category, ...]:
        """The classes, with the ids that samples have."""
        return self.datasets[0].categories

    def indexes(self, split: str) -> tuple[Index, ...]:
        """Return the split's index of each dataset; a DatasetError if one has no such split, or no sample in it."""
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
    """The endless sequence of global batches over several splits; see `Order`."""

    def __init__(self, indexes: Sequence[Index], weights: Sequence[float], settings: OrderSettings) -> None:
        if settings.group_by_aspect:
            raise DatasetError("order: group_by_aspect needs a single dataset: leave it off for a mix")
        self.settings = settings
        self.weights = whole_weights(weights)
        shares = [-(-settings.batch_size * weight // sum(self.weights)) for weight in self.weights]
        # At most as many as leave a lane of every split its share of two batches.
        self.lanes = max(1, min([settings.lanes, *(len(i) // (2 * share) for i, share in zip(indexes, shares))]))
        self._orders = [
            Order(index, replace(settings, batch_size=1, lanes=self.lanes, seed=int(fold(settings.seed, number))))
            for number, index in enumerate(indexes)
        ]
        self.indexes = tuple(order.indexes[0] for order in self._orders)
        # As many samples as one epoch of every dataset: a measure, not a boundary.
        self.batches_per_epoch = max(1, sum(order.visits for order in self._orders) // settings.batch_size)

    def identity(self) -> dict[str, Any]:
        """Return everything that determines the order, JSON-serialisable; see `Order.identity`."""
        fingerprints = [order.fingerprint for order in self._orders]
        return {**asdict(self.settings), "index": fingerprints, "weights": list(self.weights)}

    def visit(self, position: int) -> int:
        """Return a number that no two batches with the same sample share: the position."""
        return position

    def sizes(self, position: int) -> tuple[int, ...]:
        """Return the number of samples of each dataset in global batch `position`."""
        return tuple(stop - start for start, stop in self._spans(position))

    def rows(self, position: int, number: int) -> NDArray[np.int64]:
        """Return the rows, int64 [n], of the index of dataset `number` in global batch `position`."""
        return self._orders[number].endless_lane(position % self.lanes, *self._spans(position)[number])

    def _spans(self, position: int) -> list[tuple[int, int]]:
        """Return, for each dataset, the first and last sample (exclusive) of its lane that are in a batch."""
        turn, lane = divmod(position, self.lanes)
        # Lanes start at different places of the pattern, or all of them would take a rare dataset at the same time.
        phase = lane * sum(self.weights) // self.lanes
        size = self.settings.batch_size
        begin, start, stop = (apportion(phase + taken, self.weights) for taken in (0, turn * size, (turn + 1) * size))
        return [(first - zero, last - zero) for zero, first, last in zip(begin, start, stop)]


def whole_weights(weights: Sequence[float]) -> tuple[int, ...]:
    """Return the smallest whole numbers in the same proportion; a weight of 0.1 is exactly one tenth."""
    exact = [Fraction(str(weight)).limit_denominator(10**6) for weight in weights]
    whole = [int(weight * lcm(*(w.denominator for w in exact))) for weight in exact]
    common = int(np.gcd.reduce(whole))
    if min(whole) < 1:
        raise DatasetError(
            f"weights of a mix {tuple(weights)}: the smallest is below a millionth: leave that dataset out"
        )
    return tuple(number // common for number in whole)


def apportion(total: int, weights: Sequence[int]) -> tuple[int, ...]:
    """Return how many of the first `total` samples come from each dataset; the weights are above 0.

    Each dataset takes its share, rounded down, of what the datasets before it have left. The counts therefore add up to
    `total`, and none decreases when `total` grows: sample number `total` belongs to the count that grows next. Rounding
    errors accumulate, so that the last of n counts may differ from its share by up to n - 1, and none by more.
    """
    counts = []
    left, weight_left = total, sum(weights)
    for weight in weights:
        counts.append(left * weight // weight_left)
        left, weight_left = left - counts[-1], weight_left - weight
    return tuple(counts)


def _check_classes(first: Dataset, other: Dataset) -> None:
    first_names, other_names = ({category.name for category in dataset.categories} for dataset in (first, other))
    for missing, dataset in ((first_names - other_names, other), (other_names - first_names, first)):
        if missing:
            raise DatasetError(
                f"{dataset.root}: it has no class {', '.join(sorted(missing))}, which is in the mix: objects without a "
                "label would be taught as background; use the classes that all have, dataset.select(classes=...)"
            )
