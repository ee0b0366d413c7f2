"""The losses of a batch by torchvision's own functions, image by image, for given random keys.

Only what torchvision does not know is added: regions, unverified classes, boxes without masks, bitmaps.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import fastrcnn_loss
from torchvision.models.detection.rpn import concat_box_prediction_layers

from trainer.config.settings import LossConfig
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, PREDICTED, Batch
from trainer.data.mask_bitmaps import sample_targets
from trainer.step.trainable import Keys

MIN_SHARE = 0.5


def reference_losses(network: MaskRCNN, batch: Batch, keys: Keys, loss: LossConfig | None = None) -> dict[str, Tensor]:
    """The five losses; the network's samplers are replaced meanwhile."""
    targets = [_target(batch, image, loss or LossConfig()) for image in range(len(batch))]
    rpn, heads = network.rpn, network.roi_heads
    samplers = rpn.fg_bg_sampler, heads.fg_bg_sampler
    try:
        rpn.fg_bg_sampler = _KeyedSampler(samplers[0], list(keys.anchors))
        return _losses(network, batch, keys, targets, loss or LossConfig())
    finally:
        rpn.fg_bg_sampler, heads.fg_bg_sampler = samplers


def _target(batch: Batch, image: int, loss: LossConfig) -> dict[str, Tensor]:
    """The objects and the regions of one image, and at which rows of the batch the objects are."""
    objects, regions = [], []
    for row in range(int((batch.labels[image] > 0).sum())):
        flags = int(batch.flags[image, row])
        if flags & IGNORED or (flags & GROUP_OF and loss.group_of == "ignore"):
            regions.append(row)
        elif flags & GROUP_OF and loss.group_of == "background":
            continue
        elif loss.unmasked == "box" or flags & GROUP_OF or _mask_weight(flags, loss):
            objects.append(row)
    columns = {name: getattr(batch, name)[image][objects] for name in ("boxes", "labels", "flags", "bitmaps", "frames")}
    return {**columns, "rows": torch.tensor(objects, dtype=torch.int64), "regions": batch.boxes[image][regions]}


def _mask_weight(flags: int, loss: LossConfig) -> float:
    if not flags & HAS_MASK:
        return 0.0
    return loss.predicted if flags & PREDICTED else 1.0


class _KeyedSampler:
    """torchvision's sampler, with the entries of the smallest keys instead of a random permutation."""

    def __init__(self, sampler: BalancedPositiveNegativeSampler, keys: list[Tensor]) -> None:
        self.sampler, self.keys = sampler, keys

    def __call__(self, labels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        chosen: tuple[list[Tensor], list[Tensor]] = ([], [])
        size = self.sampler.batch_size_per_image
        for own, keys in zip(labels, self.keys, strict=True):
            assert len(own) == len(keys)
            left = int(size * self.sampler.positive_fraction)
            for kind, parts in zip((own >= 1, own == 0), chosen):
                index = torch.where(kind)[0]
                index = index[keys[index].argsort()[:left]]
                mask = torch.zeros_like(own, dtype=torch.uint8)
                mask[index] = 1
                parts.append(mask)
                left = size - int(chosen[0][-1].sum())
        return chosen


def _without_regions(labels: Tensor, boxes: Tensor, regions: Tensor, size: tuple[int, int]) -> Tensor:
    boxes = torch.stack([boxes[:, i].clamp(0, size[1 - i % 2]) for i in range(4)], dim=1)
    labels = labels.clone()
    for x0, y0, x1, y1 in regions.tolist():
        across = (boxes[:, 2].clamp(max=x1) - boxes[:, 0].clamp(min=x0)).clamp(min=0)
        down = (boxes[:, 3].clamp(max=y1) - boxes[:, 1].clamp(min=y0)).clamp(min=0)
        own = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
        labels[(labels == 0) & (across * down >= MIN_SHARE * own) & (own > 0)] = -1
    return labels


def _losses(
    network: MaskRCNN, batch: Batch, keys: Keys, targets: list[dict[str, Tensor]], loss: LossConfig
) -> dict[str, Tensor]:
    rpn, heads = network.rpn, network.roi_heads
    sizes = [(int(h), int(w)) for h, w in batch.sizes.tolist()]
    regions = [target["regions"] for target in targets]
    pixels = network.transform.normalize(batch.images.contiguous().float() / 255)
    for image, (height, width) in zip(pixels, sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    images = ImageList(pixels, sizes)
    features = network.backbone(pixels)
    objectness, deltas = rpn.head(list(features.values()))
    anchors = rpn.anchor_generator(images, [m.float() for m in features.values()])
    per_level = [of_level[0].numel() for of_level in objectness]
    objectness, deltas = (part.float() for part in concat_box_prediction_layers(objectness, deltas))
    boxes = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    proposals, _ = rpn.filter_proposals(boxes, objectness, sizes, per_level)
    labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
    labels = [_without_regions(*each) for each in zip(labels, anchors, regions, sizes)]
    regression = rpn.box_coder.encode(matched, anchors)
    if any(bool((own >= 0).any()) for own in labels):
        loss_objectness, loss_rpn_box_reg = rpn.compute_loss(objectness, deltas, labels, regression)
    else:  # torchvision's mean over no anchor is NaN
        loss_objectness, loss_rpn_box_reg = objectness.sum() * 0, deltas.sum() * 0

    slots = keys.proposals.shape[1] - batch.labels.shape[1]
    heads.fg_bg_sampler = _KeyedSampler(
        heads.fg_bg_sampler,
        [torch.cat((k[: len(p)], k[slots:][t["rows"]])) for k, p, t in zip(keys.proposals, proposals, targets)],
    )
    own_boxes = [t["boxes"] for t in targets]
    rois = heads.add_gt_proposals(proposals, own_boxes)
    objects, labels = heads.assign_targets_to_proposals(rois, own_boxes, [t["labels"] for t in targets])
    labels = [_without_regions(*each) for each in zip(labels, rois, regions, sizes)]
    chosen = heads.subsample(labels)
    rois, objects, labels = ([part[i] for part, i in zip(parts, chosen)] for parts in (rois, objects, labels))
    found: dict[str, Any] = {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_rpn_box_reg}
    found |= _second_stage(network, features, sizes, batch, targets, (rois, objects, labels), loss)
    return found


def _second_stage(
    network: MaskRCNN,
    features: dict[str, Tensor],
    sizes: list[tuple[int, int]],
    batch: Batch,
    targets: list[dict[str, Tensor]],
    chosen: tuple[list[Tensor], list[Tensor], list[Tensor]],
    loss: LossConfig,
) -> dict[str, Tensor]:
    heads, (rois, objects, labels) = network.roi_heads, chosen
    logits, deltas = (
        part.float() for part in heads.box_predictor(heads.box_head(heads.box_roi_pool(features, rois, sizes)))
    )
    if len(logits) == 0:
        loss_classifier, loss_box_reg = logits.sum() * 0, deltas.sum() * 0
    else:
        places = [t["boxes"] if len(t["boxes"]) else torch.zeros((1, 4)) for t in targets]
        regression = heads.box_coder.encode([p[o] for p, o in zip(places, objects)], rois)
        if loss.unverified == "ignore":
            logits = _merged(logits, labels, _verified(batch, rois))
        loss_classifier, loss_box_reg = fastrcnn_loss(logits, deltas, labels, regression)

    weights = [
        torch.tensor([_mask_weight(int(t["flags"][i]), loss) if c > 0 else 0.0 for c, i in zip(own.tolist(), o)])
        for own, o, t in zip(labels, objects, targets)
    ]
    masked = [torch.where(own > 0)[0] for own in weights]
    rois, objects, labels = ([part[i] for part, i in zip(parts, masked)] for parts in (rois, objects, labels))
    mask_logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, rois, sizes))).float()
    if len(mask_logits) == 0:
        return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": mask_logits.sum() * 0}
    expected = torch.cat(
        [sample_targets(t["bitmaps"], t["frames"], o, r, 28) for t, o, r in zip(targets, objects, rois) if len(o)]
    )
    own = mask_logits[torch.arange(len(mask_logits)), torch.cat(labels)]
    of_rois = F.binary_cross_entropy_with_logits(own, expected, reduction="none").mean(dim=(1, 2))
    weight = torch.cat([own[i] for own, i in zip(weights, masked)])
    loss_mask = (of_rois * weight).sum() / len(weight)
    return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}


def _verified(batch: Batch, rois: list[Tensor]) -> list[set[int]]:
    """The classes that are verified for each RoI: in all tiles that it touches."""
    found = []
    for tiles, verified, own in zip(batch.tiles.tolist(), batch.verified, rois):
        classes = [set(torch.where(row)[0].tolist()) for row in verified]
        for u0, v0, u1, v1 in own.tolist():
            touched = [x0 <= u1 and u0 <= x1 and y0 <= v1 and v0 <= y1 for x0, y0, x1, y1 in tiles]
            found.append(set.intersection(*itertools.compress(classes, touched)))
    return found


def _merged(logits: Tensor, labels: list[Tensor], verified: list[set[int]]) -> Tensor:
    """The logits of background RoIs with unverified classes merged into the background, one RoI after the other."""
    rows = []
    for row, label, known in zip(logits, torch.cat(labels).tolist(), verified):
        hidden = [c for c in range(1, len(row)) if c not in known]
        if label == 0 and hidden:
            background = torch.logsumexp(row[[0, *hidden]], dim=0)
            row = torch.stack(
                [background, *(row.new_tensor(-torch.inf) if c in hidden else row[c] for c in range(1, len(row)))]
            )
        rows.append(row)
    return torch.stack(rows)
