"""Loader processes for a stream: a torch `DataLoader` whose errors arrive as themselves."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from torch.utils.data import DataLoader, IterableDataset

from shards.errors import UserError
from shards.stream import EvalStream, ShardStream

T = TypeVar("T")


class Loader(Generic[T]):
    """A torch `DataLoader` over a stream; an error of a loader process arrives as itself, not as a traceback."""

    def __init__(self, inner: DataLoader) -> None:
        self.inner = inner

    def __iter__(self) -> Iterator[T]:
        for item in self.inner:
            if isinstance(item, _Failure):
                raise item.error
            yield item


def loader(
    stream: ShardStream[T] | EvalStream[T],
    *,
    workers: int = 0,
    pin_memory: bool = False,
    start_method: str | None = None,
) -> Loader[T]:
    """Read a stream with loader processes.

    Args:
        stream: a `ShardStream` or an `EvalStream`.
        workers: loader processes; 0 reads in this one.
        pin_memory: copy batches into page-locked memory (they need a `pin_memory` method).
        start_method: "fork", "forkserver" or "spawn". Default: the platform's. With "fork" the index is shared and
            not copied; each process opens connections of its own.
    """
    inner: DataLoader = DataLoader(
        _Reporting(stream),
        batch_size=None,
        num_workers=workers,
        pin_memory=pin_memory,
        multiprocessing_context=start_method if workers else None,
    )
    return Loader(inner)


@dataclass(frozen=True)
class _Failure:
    error: UserError


class _Reporting(IterableDataset):
    """Hands an error of ours over as a value: a `DataLoader` would wrap it into the text of a traceback."""

    def __init__(self, stream: ShardStream | EvalStream) -> None:
        self.stream = stream

    def set_epoch(self, epoch: int) -> None:
        self.stream.set_epoch(epoch)

    def __iter__(self) -> Iterator[Any]:
        try:
            yield from self.stream
        except UserError as error:
            yield _Failure(error)
