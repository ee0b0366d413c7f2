"""The data path of a loader process: a `webdataset.DataPipeline` from ordered samples to batches.

    samples in the exact order -> the user's stages -> parse -> batches of the order's sizes

A stage is what webdataset calls one: a function from an iterator of samples to an iterator of samples.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from typing import Any, Generic, TypeVar

import webdataset as wds

from shards.common.errors import DatasetError, SampleError
from shards.common.text import counted
from shards.order.epoch_order import EvaluationOrder, Order
from shards.order.mixture import MixedOrder
from shards.stream.reader import SampleReader
from shards.stream.replacements import BadSample, Replacements
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
    stages: Sequence[Stage] = ()
    parse: Parse = parse_sample
    skip_bad: int = 0  # damaged samples that may be replaced
    bad_samples: list[BadSample] = field(default_factory=list)  # that were
    _read: int = 0  # samples that the first stage has yielded
    _taken: int = 0  # samples that the last stage has received

    def __post_init__(self) -> None:
        # Only `parse_sample` applies a choice of classes itself, which saves writing the JSON only to parse it again.
        self._parses_alone = self.parse is parse_sample and not self.stages
        self._replacements: Replacements | None = None
        if self.skip_bad:
            self._replacements = Replacements(self.skip_bad, self.readers, self._made, self.bad_samples, self.who)

    def pipeline(self) -> Any:
        """Return the `webdataset.DataPipeline` of this pass; it can be read once."""
        parse = self.parse if self._replacements is None else partial(_or_error, self.parse)
        # The built-in `map`: webdataset's adds a key to dicts and drops None, which `parse` may return.
        return wds.DataPipeline(self.samples, *self.stages, partial(map, parse), self.batches)

    def samples(self) -> Iterator[dict[str, Any]]:
        """Yield the samples of all batches, each as webdataset's dict, one at a time: see `_stage_error`."""
        # Readers look ahead, so each iterates over the positions on its own.
        sources = [
            reader.read(
                self._rows(number),
                who=self.who,
                replace=partial(self._replaced_bytes, number) if self._replacements else None,
            )
            for number, reader in enumerate(self.readers)
        ]
        for position in self.positions():
            for number, size in enumerate(self.order.sizes(position)):
                for row, data in islice(sources[number], size):
                    if self._read != self._taken:
                        raise self._stage_error()
                    self._read += 1
                    yield self._first(number, row, data)

    def _first(self, number: int, row: int, data: memoryview) -> dict[str, Any]:
        """Return what the first stage receives of a sample, or of the one that replaces it."""
        try:
            return self._unparsed(number, row, data)
        except SampleError as error:
            if self._replacements is None:
                raise
            return self._unparsed(number, *self._replaced_bytes(number, row, error))

    def _unparsed(self, number: int, row: int, data: memoryview) -> dict[str, Any]:
        reader = self.readers[number]
        sample = read_sample(data, reader.index, row, str(reader.root))
        return sample if self._parses_alone else webdataset_sample(sample)

    def _replaced_bytes(self, number: int, row: int, error: SampleError) -> tuple[int, memoryview]:
        assert self._replacements is not None
        found = self._replacements.find(number, row, error)
        return found.row, found.data

    def _made(self, number: int, row: int, data: memoryview) -> Any:
        """Return what the last stage receives of a sample; a SampleError also if no batch can be made of it."""
        samples: Iterable[Any] = iter([self._unparsed(number, row, data)])
        for stage in self.stages:
            samples = stage(iter(samples))
        [sample] = map(self.parse, samples)
        return self._collatable(0, sample)

    def _collatable(self, visit: int, sample: Any) -> Any:
        """Return a sample, or raise the error of a batch of it alone."""
        self.collate([sample], visit)
        return sample

    def _collated(self, batch: list[Any], position: int) -> T:
        """Return a batch, in which damaged samples are replaced if they may be."""
        visit = self.order.visit(position)
        if self._replacements is None:
            return self.collate(batch, visit)
        if any(isinstance(sample, SampleError) for sample in batch):
            batch = self._replaced(batch, position)
        try:
            return self.collate(batch, visit)
        except SampleError:
            tried = [_or_error(partial(self._collatable, visit), sample) for sample in batch]
            if not any(isinstance(sample, SampleError) for sample in tried):
                raise
            return self.collate(self._replaced(tried, position), visit)

    def _replaced(self, batch: list[Any], position: int) -> list[Any]:
        """Return a batch with a sample in place of each error."""
        assert self._replacements is not None
        slots = [
            (number, row) for number in range(len(self.readers)) for row in self.order.rows(position, number).tolist()
        ]
        return [
            self._replacements.find(*slot, sample).sample if isinstance(sample, SampleError) else sample
            for slot, sample in zip(slots, batch, strict=True)
        ]

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
            yield self._collated(batch, position)

    def _stage_error(self) -> DatasetError:
        return DatasetError(
            f"a stage (or parse) received {counted(self._read, 'sample')} and passed on {self._taken}: it must "
            "yield one sample for each, in order, so that positions keep their meaning; leave samples out with "
            "dataset.select(), or in a webdataset pipeline of your own behind the stream"
        )


def _or_error(function: Callable[[Any], Any], sample: Any) -> Any:
    """Return what a function makes of a sample, or the SampleError that it raises."""
    try:
        return function(sample)
    except SampleError as error:
        return error
