"""Pasting of predicted masks into their images, on the device and in bounded memory, and their encoding as RLE.

torchvision pastes all masks of an image at once, as float at full size: 100 detections on a 4000 x 3000 photograph
take 4.8 GB. Here each mask is resized to its box only, for `PASTE_BYTES` of boxes at a time, whichever image they
belong to. The masks are the same.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate, pad
from torchvision.models.detection.roi_heads import expand_boxes

from shards.format import rle
from shards.format.rle import Rle
from trainer.step.host_copy import HostCopy

PASTE_BYTES = 16 * 2**20  # of masks that are pasted together, one byte per pixel of their boxes; at least one mask
MASK_THRESHOLD = 0.5


class Window(NamedTuple):
    """A part of an image, in pixels: right and bottom are exclusive."""

    left: int
    top: int
    right: int
    bottom: int


class Place(NamedTuple):
    """Where a mask is resized to, in pixels of its image: right and bottom are inclusive, and may be outside."""

    left: int
    top: int
    right: int
    bottom: int
    height: int  # of the image
    width: int
    window: Window  # of the image, outside of which the mask is cut off

    def inside(self) -> tuple[range, range]:
        """Return the columns and rows of the image that the mask covers."""
        window = self.window
        columns = range(max(self.left, window.left), min(self.right + 1, window.right))
        return columns, range(max(self.top, window.top), min(self.bottom + 1, window.bottom))

    def area(self) -> int:
        """Return the number of pixels of the image that the mask covers."""
        columns, rows = self.inside()
        return len(columns) * len(rows)


class Paste:
    """Masks that are pasted as by torchvision's `paste_masks_in_image`, thresholded and encoded, a group at a time.

    The first group is pasted at once, and each other one while the host encodes the group before it. For any number of
    masks this takes less than 2 * PASTE_BYTES plus 10 bytes per pixel of an image, for the mask that is being resized
    or encoded: 154 MB for 4000 x 3000 pixels.

    Args:
        masks: probabilities, float32 [K, M, M], on the device.
        boxes: float32 [K, 4] x0, y0, x1, y1 in pixels of the images.
        sizes: int64 [K, 2] height and width of each mask's image.
        windows: int64 [K, 4], a `Window` of the image for each mask; None for whole images.
    """

    def __init__(
        self,
        masks: Tensor,
        boxes: NDArray[np.float32],
        sizes: NDArray[np.int64],
        windows: NDArray[np.int64] | None = None,
    ) -> None:
        side = masks.shape[-1]
        corners = expand_boxes(torch.from_numpy(boxes), (side + 2) / side).long().numpy()
        if windows is None:
            windows = np.concatenate((np.zeros_like(sizes), sizes[:, ::-1]), axis=1)
        self._masks = pad(masks, (1, 1, 1, 1))  # [K, M + 2, M + 2]
        places = zip(np.concatenate((corners, sizes), axis=1).tolist(), windows.tolist(), strict=True)
        self._places = [Place._make([*place, Window(*window)]) for place, window in places]
        self._groups = _groups([place.area() for place in self._places])
        self._next = self._start_group()

    def encode(self) -> list[Rle]:
        """Wait for the masks and return them at the size of their images. This can be called once."""
        encoded: list[Rle] = []
        while self._next is not None:
            places, copy = self._next
            [bits] = copy.wait()
            self._next = self._start_group()
            parts = bits.split([place.area() for place in places])
            encoded += [_encode(part.numpy(), place) for part, place in zip(parts, places, strict=True)]
        return encoded

    def _start_group(self) -> tuple[list[Place], HostCopy] | None:
        """Queue the next group of masks and its copy to the host; None after the last one."""
        group = next(self._groups, None)
        if group is None:
            return None
        masks, places = self._masks[group], self._places[group]
        bits = torch.empty(sum(place.area() for place in places), dtype=torch.bool, device=masks.device)
        for mask, place, part in zip(masks, places, bits.split([place.area() for place in places]), strict=True):
            if place.area():
                _paste(mask, place, part)
        return places, HostCopy(bits)


def _groups(areas: Sequence[int]) -> Iterator[slice]:
    """Yield slices of consecutive masks with PASTE_BYTES pixels together, or of one larger mask."""
    start = total = 0
    for i, area in enumerate(areas):
        if i > start and total + area > PASTE_BYTES:
            yield slice(start, i)
            start, total = i, 0
        total += area
    if areas:
        yield slice(start, len(areas))


def _paste(mask: Tensor, place: Place, out: Tensor) -> None:
    """Write which pixels a mask, float32 [m, m], covers to bool [columns x rows]: column by column, as in RLE."""
    size = max(place.bottom - place.top + 1, 1), max(place.right - place.left + 1, 1)
    full = interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    columns, rows = place.inside()
    inside = full[
        rows.start - place.top : rows.stop - place.top, columns.start - place.left : columns.stop - place.left
    ]
    torch.ge(inside.T, MASK_THRESHOLD, out=out.view(len(columns), len(rows)))


def _encode(bits: NDArray[np.bool_], place: Place) -> Rle:
    columns, rows = place.inside()
    if not bits.size:  # outside the image
        return rle.encode(np.zeros((place.height, place.width), np.bool_))
    part = bits.reshape(len(columns), len(rows)).view(np.uint8).T
    return rle.encode_part(part, columns.start, rows.start, place.height, place.width)
