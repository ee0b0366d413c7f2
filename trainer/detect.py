"""Images in, detections out: inference of Mask R-CNN with its memory bounded.

torchvision pastes all masks of an image at once, as float at full size: 100 detections on a 4000 x 3000 photograph
take 4.8 GB. Here its own steps are called one after the other, masks are pasted `PASTE_BYTES` at a time, and what stays
of a mask is its run-length encoding. The detections are the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image
from torchvision.models.detection.transform import resize_boxes

from shards import rle
from shards.rle import Rle
from shards.sample import Instance

PASTE_BYTES = 64 * 2**20  # of full-size float masks at a time, or one mask where one is larger
MASK_THRESHOLD = 0.5


@dataclass(frozen=True, slots=True)
class Detections:
    """What was found in one image, the best score first.

    Attributes:
        boxes: (N, 4) float32: left, top, right, bottom in pixels of the image as given.
        labels: (N,) int64 category ids, from 1.
        scores: (N,) float32, 0 to 1.
        masks: N masks at the image's size.
    """

    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]
    scores: NDArray[np.float32]
    masks: tuple[Rle, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def instances(self) -> list[Instance]:
        """The detections in the form of annotations, for drawing and writing."""
        return [
            Instance(int(label), (float(x0), float(y0), float(x1 - x0), float(y1 - y0)), mask)
            for (x0, y0, x1, y1), label, mask in zip(self.boxes, self.labels, self.masks, strict=True)
        ]


@torch.no_grad()
def detect(network: MaskRCNN, images: Sequence[Tensor], device: torch.device | str) -> list[Detections]:
    """Run the network on a batch.

    Args:
        network: in evaluation mode, on `device`.
        images: uint8 or float in 0 to 1, (3, H, W) RGB each, of any sizes.
        device: where to compute.

    Returns:
        One entry an image.
    """
    if network.training:
        raise RuntimeError("the network is in training mode: call eval() first")
    inputs = [_as_float(image.to(device, non_blocking=True)) for image in images]
    batch, _ = network.transform(inputs)
    features: Any = network.backbone(batch.tensors)
    proposals, _ = network.rpn(batch, features)
    found, _ = network.roi_heads(features, proposals, batch.image_sizes)
    results = []
    for image, scaled_size, entry in zip(images, batch.image_sizes, found, strict=True):
        height, width = int(image.shape[-2]), int(image.shape[-1])
        boxes = resize_boxes(entry["boxes"], list(scaled_size), [height, width])
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
    """Masks in their boxes to masks of the image.

    Args:
        masks: float (N, 1, M, M), probabilities.
        boxes: float (N, 4), left, top, right, bottom in pixels of the image.
        height, width: of the image.
    """
    chunk = max(1, PASTE_BYTES // (4 * height * width))
    encoded: list[Rle] = []
    for start in range(0, len(masks), chunk):
        full = paste_masks_in_image(masks[start : start + chunk], boxes[start : start + chunk], (height, width))
        # RLE runs down the columns: transposed here, its encoder needs no copy.
        columns = (full[:, 0] >= MASK_THRESHOLD).transpose(1, 2).contiguous().cpu().numpy()
        encoded.extend(rle.encode(mask.T) for mask in columns)
    return encoded


def _as_float(image: Tensor) -> Tensor:
    return image.float().div_(255) if image.dtype == torch.uint8 else image
