"""Inference of Mask R-CNN in bounded memory.

torchvision pastes all masks of an image at once, as float at full size: 100 detections on a 4000 x 3000 photograph
take 4.8 GB. Here torchvision's steps are called one by one, each mask is pasted into its box only, for `PASTE_BYTES`
of boxes at a time, and encoded as RLE. The detections are the same.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import expand_boxes, expand_masks
from torchvision.models.detection.transform import resize_boxes

from shards.format import rle
from shards.format.rle import Rle
from shards.format.sample import Instance
from trainer.data.augment import scaled_size

PASTE_BYTES = 16 * 2**20  # of masks that are pasted together, one byte per pixel of their boxes; at least one mask
MASK_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Detections:
    """The detections in one image, sorted by descending score.

    Attributes:
        boxes: float32 [N, 4] left, top, right, bottom in pixels of the original image.
        labels: int64 [N] category ids, from 1.
        scores: float32 [N], 0 to 1.
        masks: N masks at the image's size.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: tuple[Rle, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def instances(self) -> list[Instance]:
        """Convert the detections to annotations, for drawing and writing."""
        return [
            Instance(int(label), (float(x0), float(y0), float(x1 - x0), float(y1 - y0)), mask)
            for (x0, y0, x1, y1), label, mask in zip(self.boxes, self.labels, self.masks, strict=True)
        ]


@torch.no_grad()
def detect(network: MaskRCNN, images: Sequence[Tensor], device: torch.device | str) -> list[Detections]:
    """Run a network in evaluation mode on RGB images of any sizes, [3, H, W] each, uint8 or float from 0 to 1."""
    if network.training:
        raise RuntimeError("the network is in training mode: call eval() first")
    inputs = [_network_input(image.to(device, non_blocking=True), network) for image in images]
    batch, _ = network.transform(inputs)
    features: Any = network.backbone(batch.tensors)
    proposals, _ = network.rpn(batch, features)
    found, _ = network.roi_heads(features, proposals, batch.image_sizes)
    results = []
    for image, input_size, entry in zip(images, batch.image_sizes, found, strict=True):
        height, width = int(image.shape[-2]), int(image.shape[-1])
        boxes = resize_boxes(entry["boxes"], list(input_size), [height, width])
        results.append(
            Detections(
                boxes=boxes.float().cpu().numpy(),
                labels=entry["labels"].cpu().numpy(),
                scores=entry["scores"].float().cpu().numpy(),
                masks=tuple(paste(entry["masks"].float(), boxes.float(), height, width)),
            )
        )
    return results


def paste(masks: Tensor, boxes: Tensor, height: int, width: int) -> list[Rle]:
    """Paste masks into the image as torchvision's `paste_masks_in_image`, threshold and encode them.

    For any number of masks this takes less than 2 * PASTE_BYTES plus 10 bytes per pixel of the image, for the mask that
    is being resized or encoded: 154 MB for 4000 x 3000 pixels. `masks` are probabilities, float [N, 1, M, M], `boxes`
    float [N, 4] left, top, right, bottom in pixels of the image.
    """
    padded, scale = expand_masks(masks, padding=1)
    places = expand_boxes(boxes, scale).to(torch.int64).tolist()
    encoded: list[Rle] = []
    for start, stop in _groups([_window(place, height, width) for place in places]):
        # In a function, so that its tensors are freed before the next group is resized.
        encoded += _paste_group(padded[start:stop, 0], places[start:stop], height, width)
    return encoded


def _paste_group(masks: Tensor, places: Sequence[Sequence[int]], height: int, width: int) -> list[Rle]:
    parts = [_paste_part(mask, place, height, width) for mask, place in zip(masks, places, strict=True)]
    shapes = [part.shape for part in parts]
    # One copy from the device for the whole group.
    bits = torch.cat([part.flatten() for part in parts]).cpu().numpy()
    del parts
    ends = np.cumsum([shape.numel() for shape in shapes])
    encoded = []
    for shape, place, piece in zip(shapes, places, np.split(bits, ends[:-1]), strict=True):
        left, top, *_ = _window(place, height, width)
        if not piece.size:  # outside the image
            left, top, shape, piece = 0, 0, torch.Size((1, 1)), np.zeros(1, np.bool_)
        encoded.append(rle.encode_part(piece.reshape(shape).view(np.uint8).T, left, top, height, width))
    return encoded


def _window(place: Sequence[int], height: int, width: int) -> tuple[int, int, int, int]:
    """Clip a box with inclusive right and bottom to the image: left, top, right, bottom (exclusive)."""
    left, top, right, bottom = place
    return max(left, 0), max(top, 0), min(right + 1, width), min(bottom + 1, height)


def _groups(windows: Sequence[tuple[int, int, int, int]]) -> Iterator[tuple[int, int]]:
    """Yield start and stop (exclusive) of consecutive windows of PASTE_BYTES together, or of one larger window."""
    start = total = 0
    for i, (left, top, right, bottom) in enumerate(windows):
        size = max(right - left, 0) * max(bottom - top, 0)
        if i > start and total + size > PASTE_BYTES:
            yield start, i
            start, total = i, 0
        total += size
    if windows:
        yield start, len(windows)


def _paste_part(mask: Tensor, place: Sequence[int], height: int, width: int) -> Tensor:
    """Return which pixels of its window a mask covers, bool [w, h]: columns first, in the order of RLE."""
    left, top, right, bottom = place
    size = max(bottom - top + 1, 1), max(right - left + 1, 1)
    full = interpolate(mask[None, None], size=size, mode="bilinear", align_corners=False)[0, 0]
    x0, y0, x1, y1 = _window(place, height, width)
    return (full[max(y0 - top, 0) : max(y1 - top, 0), max(x0 - left, 0) : max(x1 - left, 0)] >= MASK_THRESHOLD).T


def _network_input(image: Tensor, network: MaskRCNN) -> Tensor:
    """Convert an image to float, 0 to 1, and resize a very thin one as in training, to at least one pixel.

    torchvision would round its shorter side down to 0 (for 3000 x 3 pixels resized to a width of 1024) and fail. It
    does not resize an image that already has its final size.
    """
    if image.dtype == torch.uint8:
        image = image.float().div_(255)
    height, width = image.shape[-2:]
    size = scaled_size(height, width, network.transform.min_size[-1], network.transform.max_size)
    if 1 not in size:
        return image
    return interpolate(image[None], size=size, mode="bilinear", align_corners=False)[0]
