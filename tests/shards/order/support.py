import numpy as np
from numpy.typing import NDArray

from shards.order.epoch_order import Order


def whole_epoch(order: Order, epoch: int) -> NDArray[np.int64]:
    """The rows of all batches of one epoch, int64 [batches_per_epoch, B]."""
    first = epoch * order.batches_per_epoch
    return np.stack([order.rows(first + number) for number in range(order.batches_per_epoch)])
