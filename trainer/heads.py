"""What differs from torchvision's Mask R-CNN in training: losses from a flat `Batch`, and what Open Images leaves open.

torchvision's network is used as it is (backbone, RPN, heads, matchers, samplers, box losses); only the mask loss and
the way from the batch to the network are ours. With a mask for every object the box losses are torchvision's to the
bit, and the mask loss up to what sampling bitmaps instead of full-size masks changes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.roi_heads import RoIHeads, fastrcnn_loss

from trainer.instances import GROUP_OF, HAS_MASK, Batch, sample_targets

# One image's objects, with the keys that torchvision's RPN and RoIHeads read (boxes, labels, masks) and two of ours.
Target = dict[str, Tensor]


class Trainable(nn.Module):
    """A Mask R-CNN as a function from a batch to its losses: what `accelerate` wraps.

    Inference does not go through here: call `network` with a list of float images, as with torchvision.

    Args:
        network: the model; its parameters are shared, and its `state_dict` is what a checkpoint holds.
    """

    def __init__(self, network: MaskRCNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        """The five losses by torchvision's names, scalars: loss_objectness, loss_rpn_box_reg, loss_classifier,
        loss_box_reg, loss_mask. Every loss depends on every parameter of its head, whatever the batch holds."""
        network = self.network
        images = image_list(batch, network)
        targets = targets_of(batch)
        features = network.backbone(images.tensors)
        proposals, rpn_losses = network.rpn(images, features, targets)
        return {**rpn_losses, **roi_losses(network.roi_heads, features, proposals, images.image_sizes, targets)}


def image_list(batch: Batch, network: MaskRCNN) -> ImageList:
    """The batch as the backbone takes it: float32, normalised, zero in the padding (torchvision pads what is
    normalised already, so grey and not black is what lies beyond an image)."""
    sizes = [(int(height), int(width)) for height, width in batch.sizes.tolist()]
    images = network.transform.normalize(batch.images.contiguous().float() / 255)
    for image, (height, width) in zip(images, sizes):
        image[:, height:] = 0
        image[:, :, width:] = 0
    return ImageList(images, sizes)


def targets_of(batch: Batch) -> list[Target]:
    """The objects of each image: boxes, labels, masks (bitmaps), frames, has_mask.

    A group-of box is not an object and is left out. What lies in it is background for now, though it should be neither
    positive nor negative: this is the place where such regions are to be told apart.
    """
    objects = (batch.flags & GROUP_OF) == 0
    counts = [int(own.sum()) for own in objects.cpu().split(batch.counts.tolist())]
    columns = {
        "boxes": batch.boxes,
        "labels": batch.labels,
        "masks": batch.bitmaps,
        "frames": batch.frames,
        "has_mask": (batch.flags & HAS_MASK) != 0,
    }
    parts = {name: column[objects].split(counts) for name, column in columns.items()}
    return [{name: part[i] for name, part in parts.items()} for i in range(len(counts))]


def roi_losses(
    heads: RoIHeads,
    features: dict[str, Tensor],
    proposals: list[Tensor],
    sizes: list[tuple[int, int]],
    targets: list[Target],
) -> dict[str, Tensor]:
    """The losses of the second stage: `RoIHeads.forward` in training, with our mask loss.

    Args:
        heads: torchvision's.
        features: the FPN's maps.
        proposals: float32 [P, 4] of each image.
        sizes: (height, width) of each image inside the padding.
        targets: see `targets_of`.
    """
    rois, matched, labels, regression = heads.select_training_samples(proposals, targets)
    logits, deltas = heads.box_predictor(heads.box_head(heads.box_roi_pool(features, rois, sizes)))
    loss_classifier, loss_box_reg = fastrcnn_loss(logits, deltas, labels, regression)

    # A box without a mask has taught its class and place; the mask head never sees its RoIs.
    taught = [teaches_mask(*pair) for pair in zip(labels, matched, targets)]
    mask_rois = [of_image[index] for of_image, index in zip(rois, taught)]
    objects = [of_image[index] for of_image, index in zip(matched, taught)]
    mask_logits = heads.mask_predictor(heads.mask_head(heads.mask_roi_pool(features, mask_rois, sizes)))
    loss_mask = mask_loss(mask_logits, mask_rois, objects, targets)
    return {"loss_classifier": loss_classifier, "loss_box_reg": loss_box_reg, "loss_mask": loss_mask}


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
    if len(logits) == 0:
        return logits.sum() * 0  # still a function of the mask head, for which every rank waits in the backward pass
    size = logits.shape[-1]
    wanted = torch.cat(
        [sample_targets(t["masks"], t["frames"], o, r, size) for t, o, r in zip(targets, objects, rois) if len(o) > 0]
    )
    labels = torch.cat([t["labels"][o] for t, o in zip(targets, objects)])
    own = logits[torch.arange(len(labels), device=labels.device), labels]
    return F.binary_cross_entropy_with_logits(own, wanted)
