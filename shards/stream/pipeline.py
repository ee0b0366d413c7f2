"""The data path of a loader process: a `webdataset.DataPipeline` from ordered samples to batches.

    samples in the exact order -> the user's stages -> parse -> batches of the order's sizes

A stage is what webdataset calls one: a function from an iterator of samples to an iterator of samples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import webdataset as wds

from shards.common.errors import DatasetError
from shards.common.text import counted
from shards.order.epoch_order import EvaluationOrder, Order
from shards.order.mixture import MixedOrder
from shards.stream.reader import SampleReader
from shards.stream.sample_decoders import Parse, parse_sample, read_sample, webdataset_sample

T = TypeVar("T")
Collate = Callable[[list[Any], int], T]  # of what `parse` returns, and the visit
Stage = Callable[[Iterator[Any]], Iterable[Any]]
AnyOrder = Order | MixedOrder | EvaluationOrder


@dataclass
class BatchReader(Generic[T]):
    """One pass over the batches at some positions: the first and the last stage of a pipeline."""

    order: AnyOrder
    positions: Callable[[], Iterator[int]]  # of the batches, from the first one at each call
    readers: Sequence[SampleReader]  # one per dataset
    collate: Collate[T]
    who: str  # named in the log if storage stalls
    _read: int = 0  # samples that the first stage has yielded
    _taken: int = 0  # samples that the last stage has received

    def pipeline(self, stages: Sequence[Stage], parse: Parse) -> Any:
        """Return the `webdataset.DataPipeline` of this pass; it can be read once."""
        # Only `parse_sample` applies a choice of classes itself, which saves writing the JSON only to parse it again.
        choose = [] if parse is parse_sample and not stages else [wds.map(webdataset_sample)]
        # The built-in `map`: webdataset's adds a key to dicts and drops None, which `parse` may return.
        return wds.DataPipeline(self.samples, *choose, *stages, partial(map, parse), self.batches)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of all batches, each as webdataset's dict, one at a time: see `_stage_error`."""
        # Readers look ahead, so each iterates over the positions on its own.
        sources = [reader.read(self._rows(number), who=self.who) for number, reader in enumerate(self.readers)]
        roots = [str(reader.root) for reader in self.readers]
        for position in self.positions():
            for number, size in enumerate(self.order.sizes(position)):
                for row, data in islice(sources[number], size):
                    if self._read != self._taken:
                        raise self._stage_error()
                    self._read += 1
                    yield read_sample(data, self.readers[number].index, row, roots[number])

    def _rows(self, number: int) -> Iterator[int | None]:
        for position in self.positions():
            rows = self.order.rows(position, number)
            yield from rows if len(rows) else (None,)

    def batches(self, samples: Iterator[Any]) -> Iterator[T]:
        """Yield batches of the order's sizes, as webdataset's `batched` does for a fixed size; see `_stage_error`."""
        for position in self.positions():
            size, batch = sum(self.order.sizes(position)), list[Any]()
            for sample in islice(samples, size):
                self._taken += 1
                batch.append(sample)
            if self._read != self._taken or len(batch) < size:
                raise self._stage_error()
            yield self.collate(batch, self.order.visit(position))

    def _stage_error(self) -> DatasetError:
        return DatasetError(
            f"a stage (or parse) received {counted(self._read, 'sample')} and passed on {self._taken}: it must "
            "yield one sample for each, in order, so that positions keep their meaning; leave samples out with "
            "dataset.select(), or in a webdataset pipeline of your own behind the stream"
        )
