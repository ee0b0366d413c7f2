"""Images of any format, read and decoded in loader processes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from torch import Tensor
from torch.utils.data import get_worker_info

from shards.common.errors import UserError
from shards.order.epoch_order import positions
from shards.stream.reader import SampleStatistics
from shards.stream.streams import Stream
from trainer.data.collate import IMAGE_FORMATS, decode_image
from trainer.prediction.image_inputs import read_image


@dataclass(frozen=True)
class DecodedImage:
    """An image: its number in the stream's list, and its pixels, uint8 [3, H, W] RGB."""

    number: int
    pixels: Tensor

    def pin_memory(self) -> DecodedImage:
        """Copy the pixels into page-locked memory, from which they are copied to a GPU asynchronously."""
        return replace(self, pixels=self.pixels.pin_memory())


@dataclass(frozen=True)
class UnreadableImage:
    """An image that could not be read or decoded: its number in the stream's list, and why."""

    number: int
    reason: str


class ImageStream(Stream[DecodedImage | UnreadableImage]):
    """The images of a list of paths and URLs, in its order; for `shards.stream.loader.loader`."""

    def __init__(self, images: Sequence[str]) -> None:
        super().__init__(batch_size=1)
        self.images, self.statistics = images, SampleStatistics()
        self._source = f"{len(images)} images"

    def __iter__(self) -> Iterator[DecodedImage | UnreadableImage]:
        info = get_worker_info()
        worker, workers = (0, 1) if info is None else (info.id, info.num_workers)
        own = positions(0, rank=0, world=1, worker=worker, workers=workers, stop=len(self.images))
        yield from map(self._read, own)

    def __len__(self) -> int:
        return len(self.images)

    def _read(self, number: int) -> DecodedImage | UnreadableImage:
        try:
            return DecodedImage(number, decode_image(read_image(self.images[number]), IMAGE_FORMATS))
        except UserError as error:
            return UnreadableImage(number, str(error))
