"""What differs from torchvision's Mask R-CNN in training: losses from a flat `Batch`, and what Open Images leaves open.

torchvision's network is used as it is (backbone, RPN, heads, matchers, samplers, box losses). `rpn_losses` and
`roi_losses` are the training halves of its `RegionProposalNetwork.forward` and `RoIHeads.forward`, written out where
`trainer.model.partial_labels` steps in. With a mask for every object, no region and every class verified, the box
losses are
torchvision's to the bit, and the mask loss up to what sampling bitmaps instead of full-size masks changes.
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
from trainer.model.partial_labels import join_unverified, leave_out, verified_table
from trainer.model.roi_align import pool

# One image's objects, with the keys that torchvision's RPN and RoIHeads read (boxes, labels, masks) and ours.
Target = dict[str, Tensor]


class Trainable(nn.Module):
    """A Mask R-CNN as a function from a batch to its losses: what `accelerate` wraps.

    Inference does not go through here: call `network` with a list of float images, as with torchvision.

    Args:
        network: the model; its parameters are shared, and its `state_dict` is what a checkpoint holds.
        loss: what incomplete annotations teach.
    """

    def __init__(self, network: MaskRCNN, loss: LossConfig | None = None) -> None:
        super().__init__()
        self.network = network
        self.loss = loss or LossConfig()

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The five losses by torchvision's names, scalars: loss_objectness, loss_rpn_box_reg, loss_classifier,
        loss_box_reg, loss_mask. Every loss depends on every parameter of its head, whatever the batch holds."""
        network = self.network
        images = image_list(batch, network)
        targets = targets_of(batch, self.loss)
        features = network.backbone(images.tensors)
        proposals, losses = rpn_losses(network.rpn, images, features, targets)
        verified = batch.verified if self.loss.unverified == "ignore" else (None,) * len(batch)
        return losses | roi_losses(network.roi_heads, features, proposals, images.image_sizes, targets, verified)


def image_list(batch: Batch, network: MaskRCNN) -> ImageList:
    """The batch as the backbone takes it: float32, normalised, zero in the padding (torchvision pads what is
    normalised already, so grey and not black is what lies beyond an image)."""
    sizes = [(int(height), int(width)) for height, width in batch.sizes.tolist()]
    images = network.transform.normalize(batch.images.contiguous().float() / 255)
    for image, (height, width) in zip(images, sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return ImageList(images, sizes)


def targets_of(batch: Batch, loss: LossConfig) -> list[Target]:
    """What each image teaches: its objects as boxes, labels, masks (bitmaps), frames and has_mask, and regions,
    float32 [G, 4], in which nothing is taught that matches no object."""
    # On the host, where `flags` lies: no GPU is waited for.
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
    parts = {name: _of_images(column, objects, batch.counts) for name, column in columns.items()}
    parts["regions"] = _of_images(batch.boxes, regions, batch.counts)
    return [{name: part[i] for name, part in parts.items()} for i in range(len(batch))]


def _of_images(column: Tensor, chosen: Tensor, counts: Tensor) -> tuple[Tensor, ...]:
    """The rows of each image that are chosen.

    Args:
        column: [M, ...] on any device.
        chosen: bool [M] on the host.
        counts: int64 [B] rows of each image, on the host.
    """
    if not bool(chosen.all()):
        column = column[torch.where(chosen)[0].to(column.device, non_blocking=True)]
        counts = torch.stack([part.sum() for part in chosen.split(counts.tolist())])
    rows: tuple[Tensor, ...] = column.split(counts.tolist())
    return rows


def rpn_losses(
    rpn: RegionProposalNetwork, images: ImageList, features: dict[str, Tensor], targets: list[Target]
) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The first stage: `RegionProposalNetwork.forward` in training, but for the anchors in regions.

    Returns:
        float32 [P, 4] proposals of each image, and the two losses.
    """
    maps = list(features.values())
    objectness, deltas = rpn.head(maps)
    # Anchors take the type of the maps that they are asked for, of which else only the size is read. In bfloat16 those
    # beyond pixel 512 would stand on a grid of four pixels: from here on all is float32, whatever the convolutions are.
    anchors = rpn.anchor_generator(images, [m.new_empty((1, 1, *m.shape[-2:]), dtype=torch.float32) for m in maps])
    each_level = [of_level[0].numel() for of_level in objectness]
    objectness, deltas = (part.float() for part in concat_box_prediction_layers(objectness, deltas))
    proposals = rpn.box_coder.decode(deltas.detach(), anchors).view(len(anchors), -1, 4)
    boxes, _ = rpn.filter_proposals(proposals, objectness, images.image_sizes, each_level)

    labels, matched = rpn.assign_targets_to_anchors(anchors, targets)
    labels = [leave_out(own, places, t["regions"]) for own, places, t in zip(labels, anchors, targets)]
    if any(len(t["regions"]) for t in targets) and not any(bool((of_image >= 0).any()) for of_image in labels):
        # Regions all over every image: torchvision's mean over no anchor would not be a number.
        return boxes, {"loss_objectness": objectness.sum() * 0, "loss_rpn_box_reg": deltas.sum() * 0}
    regression = rpn.box_coder.encode(matched, anchors)
    loss_objectness, loss_rpn_box_reg = rpn.compute_loss(objectness, deltas, labels, regression)
    return boxes, {"loss_objectness": loss_objectness, "loss_rpn_box_reg": loss_rpn_box_reg}


@dataclass(frozen=True)
class Rois:
    """What the second stage trains on, an entry an image.

    Attributes:
        boxes: float32 [R, 4].
        objects: int64 [R] the object that each was matched with, an index into the image's target.
        labels: int64 [R] the class that each is to learn, 0 for background.
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
    """The losses of the second stage: `RoIHeads.forward` in training, with our mask loss.

    Args:
        heads: torchvision's.
        features: the FPN's maps.
        proposals: float32 [P, 4] of each image.
        sizes: (height, width) of each image inside the padding.
        targets: see `targets_of`.
        verified: see `Batch`.
    """
    rois = sample_rois(heads, proposals, targets)
    logits, deltas = heads.box_predictor(heads.box_head(pool(heads.box_roi_pool, features, rois.boxes, sizes)))
    loss_classifier, loss_box_reg = box_losses(heads, logits, deltas, rois, targets, verified)

    # A box without a mask has taught its class and place; the mask head never sees its RoIs.
    taught = [teaches_mask(*of_image) for of_image in zip(rois.labels, rois.objects, targets)]
    boxes = [of_image[index] for of_image, index in zip(rois.boxes, taught)]
    objects = [of_image[index] for of_image, index in zip(rois.objects, taught)]
    mask_logits = heads.mask_predictor(heads.mask_head(pool(heads.mask_roi_pool, features, boxes, sizes)))
    loss_mask = mask_loss(mask_logits, boxes, objects, targets)
    return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}


def sample_rois(heads: RoIHeads, proposals: list[Tensor], targets: list[Target]) -> Rois:
    """The RoIs that train: `RoIHeads.select_training_samples`, but for the proposals in regions."""
    boxes = [t["boxes"] for t in targets]
    proposals = heads.add_gt_proposals(proposals, boxes)
    objects, labels = heads.assign_targets_to_proposals(proposals, boxes, [t["labels"] for t in targets])
    labels = [leave_out(own, places, t["regions"]) for own, places, t in zip(labels, proposals, targets)]
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
    """Cross-entropy of the classes and smooth L1 of the boxes, both averaged over RoIs; 0 where there is none.

    Args:
        logits, deltas: float [R, C] and [R, 4 C], the box head's answers.
        heads, targets, verified: see `roi_losses`.
    """
    if len(logits) == 0:  # regions all over every image
        return logits.float().sum() * 0, deltas.float().sum() * 0
    # An image without objects has only background, whose place is never asked for.
    places = [t["boxes"] if len(t["boxes"]) else t["boxes"].new_zeros((1, 4)) for t in targets]
    regression = heads.box_coder.encode([of_image[i] for of_image, i in zip(places, rois.objects)], rois.boxes)
    table = verified_table(verified, logits.shape[1])
    if table is not None:
        logits = join_unverified(logits.float(), rois.labels, table)
    loss_classifier, loss_box_reg = fastrcnn_loss(logits.float(), deltas.float(), rois.labels, regression)
    return loss_classifier, loss_box_reg


def teaches_mask(labels: Tensor, matched: Tensor, target: Target) -> Tensor:
    """Which RoIs of an image have a mask to learn.

    Args:
        labels: int64 [R] the class that each RoI is to learn, 0 for background.
        matched: int64 [R] the object that each RoI was matched with.
        target: the image's objects.

    Returns:
        int64 [K] indices, ascending.
    """
    positive = torch.where(labels > 0)[0]
    return positive[target["has_mask"][matched[positive]]]


def mask_loss(logits: Tensor, rois: list[Tensor], objects: list[Tensor], targets: list[Target]) -> Tensor:
    """Binary cross-entropy of each RoI's mask for its own class, averaged over RoIs and cells; 0 where there is none.

    Args:
        logits: float [R, C, S, S] of all images' RoIs, in their order.
        rois: float32 [R_i, 4] of each image.
        objects: int64 [R_i] of each image, indices into its target.
        targets: see `targets_of`.
    """
    if len(logits) == 0:  # still a function of the mask head, for which every rank waits in the backward pass
        return logits.float().sum() * 0
    size = logits.shape[-1]
    wanted = torch.cat(
        [sample_targets(t["masks"], t["frames"], o, r, size) for t, o, r in zip(targets, objects, rois) if len(o) > 0]
    )
    labels = torch.cat([t["labels"][o] for t, o in zip(targets, objects)])
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, wanted)
