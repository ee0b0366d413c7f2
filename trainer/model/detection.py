"""Mask R-CNN at inference on a whole batch: three stages, between which the host reads a few values of the device.

The detections are those of torchvision's network, which goes through the images one by one, and waits for the device
several times for each. A stage queues its work and starts to copy what the host needs for the next one, so that a
caller can queue other work before it starts the next stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import interpolate
from torchvision.models.detection import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign

from trainer.data.augment import scaled_size
from trainer.step.boxes import decode
from trainer.step.host_copy import HostCopy, to_device
from trainer.step.losses import of_label
from trainer.step.nms import nms_keep
from trainer.step.proposals import Proposals, anchors_of, flatten_levels, propose
from trainer.step.roi_align import Rois, pool_in_fixed_shapes, pool_on_cpu

MIN_SIDE = 1e-2  # pixels; torchvision drops smaller boxes


class Sizes(NamedTuple):
    """Height and width of each image of a batch.

    Attributes:
        original: int64 [B, 2].
        resized: int64 [B, 2], as the network sees them, without padding.
    """

    original: NDArray[np.int64]
    resized: NDArray[np.int64]


class Scored(NamedTuple):
    """The scores of a batch's proposals for each class.

    Attributes:
        sizes: of the images.
        maps: from which RoIs are read, [B, F, h, w] of each level.
        corners: float32 [B, 4] width, height, width, height of the resized images, to which boxes are clipped.
        proposals: float32 [B, P, 4] x0, y0, x1, y1 in pixels of the padded input.
        deltas: float32 [B, P, C + 1, 4] for each class; column 0 is the background.
        scores: float32 [B * C, P]; -1 where the score is not above the network's threshold.
        counts: how many rows have a score above it, and the largest number of such scores in a row.
    """

    sizes: Sizes
    maps: list[Tensor]
    corners: Tensor
    proposals: Tensor
    deltas: Tensor
    scores: Tensor
    counts: HostCopy


class Boxes(NamedTuple):
    """The best D boxes of each image, in descending order of score.

    Attributes:
        sizes: as in `Scored`.
        maps: as in `Scored`.
        boxes: float32 [B, D, 4] x0, y0, x1, y1 in pixels of the padded input.
        labels: int64 [B, D] category ids.
        on_host: copies of boxes, labels, and the scores, float32 [B, D]; a score is -1 where an image has fewer boxes.
    """

    sizes: Sizes
    maps: list[Tensor]
    boxes: Tensor
    labels: Tensor
    on_host: HostCopy


def sizes_of(network: MaskRCNN, images: Sequence[Tensor]) -> Sizes:
    """Return the sizes of images, [3, H, W] each, before and after resizing.

    A very thin image is resized to at least one pixel, as in training. torchvision would round its shorter side down to
    0 (for 3000 x 3 pixels resized to a width of 1024) and fail.
    """
    limits = network.transform.min_size[-1], network.transform.max_size
    original = [(int(image.shape[-2]), int(image.shape[-1])) for image in images]
    return Sizes(np.array(original), np.array([scaled_size(*size, *limits) for size in original]))


def padded_size(network: MaskRCNN, sizes: Sizes) -> tuple[int, int]:
    """Return the height and width of a batch: those of its largest images, as multiples of the network's stride."""
    stride = network.transform.size_divisible
    height, width = (-(-sizes.resized.max(axis=0) // stride) * stride).tolist()
    return height, width


def network_input(network: MaskRCNN, images: Sequence[Tensor], sizes: Sizes, device: torch.device) -> Tensor:
    """Normalise, resize and pad images on the device, as torchvision's transform at inference: [B, 3, H, W]."""
    transform = network.transform
    mean, std = to_device(np.array([transform.image_mean, transform.image_std], np.float32), device)[..., None, None]
    batch = torch.zeros((len(images), 3, *padded_size(network, sizes)), device=device)
    for image, (rows, columns), slot in zip(images, sizes.resized.tolist(), batch, strict=True):
        pixels = image.to(device, non_blocking=True)
        if pixels.dtype == torch.uint8:
            pixels = pixels.float().div_(255)
        normal = ((pixels - mean) / std)[None]
        slot[:, :rows, :columns] = interpolate(normal, size=(rows, columns), mode="bilinear", align_corners=False)[0]
    return batch


@torch.no_grad()
def score_proposals(network: MaskRCNN, device: torch.device, images: Sequence[Tensor]) -> Scored:
    """Find proposals in RGB images of any sizes, uint8 or float32 from 0 to 1, and score them for each class."""
    heads, sizes = network.roi_heads, sizes_of(network, images)
    batch, limits = network_input(network, images, sizes, device), to_device(sizes.resized.astype(np.float32), device)
    maps = list(network.backbone(batch).values())
    anchors = anchors_of(network.rpn.anchor_generator, batch.shape[-2], batch.shape[-1], device)
    proposals = propose(network.rpn, anchors, *flatten_levels(*network.rpn.head(maps)), limits)
    if not in_fixed_shapes(device):
        proposals = Proposals(*(part[:, : max(int(proposals.valid.sum(dim=1).max()), 1)] for part in proposals))
    maps = maps[: len(heads.box_roi_pool.featmap_names)]
    numbers = torch.arange(len(batch), device=device)[:, None].expand_as(proposals.valid)
    pooled = _pool(heads.box_roi_pool, maps, Rois(proposals.boxes.flatten(0, 1), numbers.flatten()))
    logits, deltas = heads.box_predictor(heads.box_head(pooled))  # [B * P, C + 1], [B * P, (C + 1) * 4]
    scores = logits.float().softmax(dim=1).unflatten(0, numbers.shape)[..., 1:]  # [B, P, C]
    is_candidate = (scores > heads.score_thresh) & proposals.valid[..., None]
    per_class = is_candidate.sum(dim=1)  # [B, C]
    return Scored(
        sizes,
        maps,
        limits.flip(1).repeat(1, 2),
        proposals.boxes,
        deltas.float().unflatten(1, (-1, 4)).unflatten(0, numbers.shape),
        scores.masked_fill(~is_candidate, -1).transpose(1, 2).flatten(0, 1),
        HostCopy(torch.stack(((per_class > 0).sum(), per_class.max()))),
    )


@torch.no_grad()
def choose_boxes(network: MaskRCNN, scored: Scored) -> Boxes:
    """Choose the best boxes of each image that overlap no better one of their class.

    As `RoIHeads.postprocess_detections`. Boxes are decoded for the candidates only: S rows, each of one class in one
    image, of N candidates or fewer.
    """
    heads, images = network.roi_heads, len(scored.corners)
    rows, most = (max(count, 1) for count in scored.counts.read())
    chosen = scored.scores.amax(dim=1).topk(rows).indices  # [S] of B * C
    scores, index = scored.scores[chosen].sort(dim=1, descending=True, stable=True)
    scores, index = scores[:, :most], index[:, :most]  # [S, N]
    classes = len(scored.scores) // images
    image, label = (chosen // classes)[:, None], (chosen % classes + 1)[:, None]  # [S, 1]
    boxes = decode(heads.box_coder, scored.deltas[image, index, label], scored.proposals[image, index])
    boxes = torch.minimum(boxes.clamp(min=0), scored.corners[image])  # [S, N, 4]
    is_valid = (boxes[..., 2:] - boxes[..., :2] >= MIN_SIDE).all(dim=-1) & (scores >= 0)
    keep = nms_keep(boxes, scores, is_valid, [most], heads.nms_thresh)
    scores = scores.masked_fill(~keep, -1)
    # By score, and equal scores by proposal and class, as in torchvision: floats of 0 or more compare as their bits do.
    rank = (scores.view(torch.int32).long() << 32) - (index * classes + label)  # [S, N]
    is_own = image[:, 0] == torch.arange(images, device=image.device)[:, None]  # [B, S]
    rank = rank.masked_fill(~is_own[..., None], -1).flatten(1)  # [B, S * N]
    best = rank.topk(min(heads.detections_per_img, rank.shape[1]), dim=1)  # [B, D]
    boxes, labels = boxes.flatten(0, 1)[best.indices], label.expand_as(scores).flatten()[best.indices]
    scores = scores.flatten()[best.indices].masked_fill(best.values < 0, -1)
    return Boxes(scored.sizes, scored.maps, boxes, labels, HostCopy(boxes, labels, scores))


@torch.no_grad()
def predict_masks(network: MaskRCNN, found: Boxes, slots: NDArray[np.int64]) -> Tensor:
    """Predict the masks of boxes for their own class.

    Args:
        network: in evaluation mode.
        found: the boxes.
        slots: int64 [K], ascending, of the B * D boxes.

    Returns:
        Probabilities, float32 [K, M, M].
    """
    index = to_device(slots, found.boxes.device)
    rois = Rois(found.boxes.flatten(0, 1)[index], index // found.boxes.shape[1])
    return masks_of_rois(network, found.maps, rois, found.labels.flatten()[index])


def masks_of_rois(network: MaskRCNN, maps: list[Tensor], rois: Rois, labels: Tensor) -> Tensor:
    """Predict the mask of each RoI for its label, int64 [K]: probabilities, float32 [K, M, M]; `maps` as in `Boxes`."""
    heads = network.roi_heads
    logits = heads.mask_predictor(heads.mask_head(_pool(heads.mask_roi_pool, maps, rois)))
    return of_label(logits.float(), labels).sigmoid()


def in_fixed_shapes(device: torch.device) -> bool:
    """Return whether empty slots of proposals are computed as well, which is quicker than to read their number."""
    return device.type != "cpu"


def _pool(pooler: MultiScaleRoIAlign, maps: list[Tensor], rois: Rois) -> Tensor:
    pool = pool_in_fixed_shapes if in_fixed_shapes(rois.boxes.device) else pool_on_cpu
    return pool(pooler, maps, rois)
