"""The losses of torchvision's Mask R-CNN from a flat `Batch` with incomplete annotations.

torchvision's backbone, RPN, heads, matchers, samplers and box losses are used unchanged. `rpn_losses` and `roi_losses`
are the training halves of its `RegionProposalNetwork.forward` and `RoIHeads.forward`, written out to call
`trainer.model.partial_labels`. With a mask for every object, no region and every class verified, the box losses equal
torchvision's to the bit, and the mask loss differs only because it samples bitmaps instead of full-size masks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss
from torchvision.models.detection.rpn import RegionProposalNetwork, concat_box_prediction_layers

from trainer.config.settings import LossConfig
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, Batch
from trainer.data.mask_bitmaps import sample_targets
from trainer.model.partial_labels import ignore_regions, merge_unverified, verified_table
from trainer.model.roi_align import pool

# The objects of one image: boxes, labels and masks, which torchvision's RPN and RoIHeads read, and this package's
# frames, has_mask and regions. See `targets_of`.
Target = dict[str, Tensor]


class Trainable(nn.Module):
    """A Mask R-CNN as a function from a batch to its losses, for `accelerate` to wrap.

    For inference call `network`, which is not copied, with a list of float images, as in torchvision. Checkpoints
    contain its `state_dict`. `loss` says how incomplete annotations are treated.
    """

    def __init__(self, network: MaskRCNN, loss: LossConfig | None = None) -> None:
        super().__init__()
        self.network = network
        self.loss = loss or LossConfig()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """Compute loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg and loss_mask, scalars.

        Every loss depends on every parameter of its head, whatever the batch contains, as DDP requires.
        """
        network = self.network
        images = image_list(batch, network)
        targets = targets_of(batch, self.loss)
        features = network.backbone(images.tensors)
        proposals, losses = rpn_losses(network.rpn, images, features, targets)
        verified = batch.verified if self.loss.unverified == "ignore" else (None,) * len(batch)
        return losses | roi_losses(network.roi_heads, features, proposals, images.image_sizes, targets, verified)


def image_list(batch: Batch, network: MaskRCNN) -> ImageList:
    """Convert the images to float32 and normalise them, with zeros in the padding.

    As in torchvision, which pads after it normalises: the padding is the mean colour, not black.
    """
    sizes = [(int(height), int(width)) for height, width in batch.sizes.tolist()]
    images = network.transform.normalize(batch.images.contiguous().float() / 255)
    for image, (height, width) in zip(images, sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return ImageList(images, sizes)


def targets_of(batch: Batch, loss: LossConfig) -> list[Target]:
    """Split a batch into the objects and the ignored regions of each image.

    Returns:
        The columns of the objects (boxes, labels, bitmaps as masks, frames and has_mask, bool [M]) and regions, float32
        [G, 4], where anchors and RoIs that match no object are ignored.
    """
    # Computed on the host, where `flags` is, so that nothing waits for a GPU.
    group, masked = (batch.flags & GROUP_OF) != 0, (batch.flags & HAS_MASK) != 0
    regions = (batch.flags & IGNORED) != 0
    objects = ~regions
    if loss.group_of == "ignore":
        regions = regions | group
    if loss.group_of != "object":
        objects = objects & ~group
    if loss.unmasked == "background":
        objects = objects & (masked | group)
    columns = {
        "boxes": batch.boxes,
        "labels": batch.labels,
        "masks": batch.bitmaps,
        "frames": batch.frames,
        "has_mask": masked.to(batch.boxes.device, non_blocking=True),
    }
    parts = {name: _split(column, objects, batch.counts) for name, column in columns.items()}
    parts["regions"] = _split(batch.boxes, regions, batch.counts)
    return [{name: part[i] for name, part in parts.items()} for i in range(len(batch))]


def _split(column: Tensor, chosen: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """Split the chosen rows, bool [M] on the host, of a column, [M, ...] on any device, by image."""
    if not bool(chosen.all()):
        column = column[torch.where(chosen)[0].to(column.device, non_blocking=True)]
        counts = torch.stack([part.sum() for part in chosen.split(counts.tolist())])
    rows: tuple[Tensor, ...] = column.split(counts.tolist())
    return rows


def rpn_losses(
    rpn: RegionProposalNetwork, images: ImageList, features: dict[str, Tensor], targets: list[Target]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """Run the first stage: `RegionProposalNetwork.forward` in training, except that background in regions is ignored.

    Returns:
        float32 [P, 4] proposals of each image, and loss_objectness and loss_rpn_box_reg.
    """
    maps = list(features.values())
    objectness, deltas = rpn.head(maps)
    # Anchors get the dtype of the maps that are passed, of which only the size is read otherwise. In bfloat16, anchors
    # beyond pixel 512 would be rounded to four pixels: from here on all is float32, whatever the convolutions use.
    anchors = rpn.anchor_generator(images, [m.new_empty((1, 1, *m.shape[-2:]), dtype=torch.float32) for m in maps])
    anchors_per_level = [of_level[0].numel() for of_level in objectness]
    objectness, deltas = (part.float() for part in concat_box_prediction_layers(objectness, deltas))
    proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    kept, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, anchors_per_level)

    labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
    labels = [ignore_regions(of_image, boxes, t["regions"]) for of_image, boxes, t in zip(labels, anchors, targets)]
    if any(len(t["regions"]) for t in targets) and not any(bool((of_image >= 0).any()) for of_image in labels):
        # Regions cover every image, and torchvision's mean over no anchor would be NaN.
        return kept, {"loss_objectness": objectness.sum() * 0, "loss_rpn_box_reg": deltas.sum() * 0}
    regression = rpn.box_coder.encode(matched, anchors)
    loss_objectness, loss_rpn_box_reg = rpn.compute_loss(objectness, deltas, labels, regression)
    return kept, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_rpn_box_reg}


@dataclass(frozen=True)
class Rois:
    """The RoIs that train the second stage, one entry per image.

    Attributes:
        boxes: float32 [R, 4] x0, y0, x1, y1 in pixels.
        objects: int64 [R] the matched object, an index into the image's target.
        labels: int64 [R] the target class, 0 for background.
    """

    boxes: list[Tensor]
    objects: list[Tensor]
    labels: list[Tensor]


def roi_losses(
    heads: RoIHeads,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    sizes: list[tuple[int, int]],
    targets: list[Target],
    verified: Sequence[Sequence[int] | None],
) -> dict[str, Tensor]:
    """Run the second stage: `RoIHeads.forward` in training, with masks sampled from bitmaps.

    `proposals` are float32 [P, 4] per image, `sizes` those inside the padding; for `verified` see `Batch`.
    """
    rois = sample_rois(heads, proposals, targets)
    logits, deltas = heads.box_predictor(heads.box_head(pool(heads.box_roi_pool, features, rois.boxes, sizes)))
    loss_classifier, loss_box_reg = box_losses(heads, logits, deltas, rois, targets, verified)

    # A RoI of an object without a mask trains class and box, and does not reach the mask head.
    masked = [rois_with_mask(*of_image) for of_image in zip(rois.labels, rois.objects, targets)]
    boxes = [of_image[index] for of_image, index in zip(rois.boxes, masked)]
    objects = [of_image[index] for of_image, index in zip(rois.objects, masked)]
    mask_logits = heads.mask_predictor(heads.mask_head(pool(heads.mask_roi_pool, features, boxes, sizes)))
    loss_mask = mask_loss(mask_logits, boxes, objects, targets)
    return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}


def sample_rois(heads: RoIHeads, proposals: list[Tensor], targets: list[Target]) -> Rois:
    """Choose RoIs: `RoIHeads.select_training_samples`, except that background in regions is ignored."""
    boxes = [t["boxes"] for t in targets]
    proposals = heads.add_gt_proposals(proposals, boxes)
    objects, labels = heads.assign_targets_to_proposals(proposals, boxes, [t["labels"] for t in targets])
    labels = [ignore_regions(of_image, boxes, t["regions"]) for of_image, boxes, t in zip(labels, proposals, targets)]
    chosen = heads.subsample(labels)
    return Rois(*([of_image[i] for of_image, i in zip(part, chosen)] for part in (proposals, objects, labels)))


def box_losses(
    heads: RoIHeads,
    logits: Tensor,
    deltas: Tensor,
    rois: Rois,
    targets: list[Target],
    verified: Sequence[Sequence[int] | None],
) -> tuple[Tensor, Tensor]:
    """Compute cross-entropy of the classes and smooth L1 of the boxes, averaged over RoIs; 0 without RoIs.

    The box predictor's `logits` are float [R, C], its `deltas` float [R, 4 C].
    """
    if len(logits) == 0:  # regions cover every image
        return logits.float().sum() * 0, deltas.float().sum() * 0
    # An image without objects has only background RoIs, whose box targets are not used.
    places = [t["boxes"] if len(t["boxes"]) else t["boxes"].new_zeros((1, 4)) for t in targets]
    regression = heads.box_coder.encode([of_image[i] for of_image, i in zip(places, rois.objects)], rois.boxes)
    table = verified_table(verified, logits.shape[1])
    if table is not None:
        logits = merge_unverified(logits.float(), rois.labels, table)
    loss_classifier, loss_box_reg = fastrcnn_loss(logits.float(), deltas.float(), rois.labels, regression)
    return loss_classifier, loss_box_reg


def rois_with_mask(labels: Tensor, objects: Tensor, target: Target) -> Tensor:
    """Return the indices, int64 [K], of an image's RoIs that match an object with a mask."""
    positive = torch.where(labels > 0)[0]
    return positive[target["has_mask"][objects[positive]]]


def mask_loss(logits: Tensor, rois: list[Tensor], objects: list[Tensor], targets: list[Target]) -> Tensor:
    """Compute binary cross-entropy of each RoI's mask for its own class, averaged over RoIs and pixels; 0 without RoIs.

    `logits` are float [R, C, S, S] of all images' RoIs; `objects` are per image the indices into its target.
    """
    if len(logits) == 0:  # still depends on the mask head, whose gradient every rank waits for
        return logits.float().sum() * 0
    size = logits.shape[-1]
    expected = torch.cat(
        [sample_targets(t["masks"], t["frames"], o, r, size) for t, o, r in zip(targets, objects, rois) if len(o) > 0]
    )
    labels = torch.cat([t["labels"][o] for t, o in zip(targets, objects)])
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, expected)
