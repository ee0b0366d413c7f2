"""What the annotations of a batch mean to the step: objects to learn from, and regions where nothing is taught.

- A group-of box covers objects that were not annotated one by one. An anchor or RoI in such a region that matches no
  object is ignored: neither positive nor negative.
- A box without a mask trains class and box, and with `loss.unmasked` masks, what the box says about the mask.
- A predicted mask trains like others, with the weight `loss.predicted`; of weight 0, it is none. Besides, with
  `loss.unmasked` masks, the object's box trains the mask as it does without a mask.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from trainer.config.settings import LossConfig
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, LOOSE, PREDICTED, Batch


class GroundTruth(NamedTuple):
    """The annotations of a batch. Rows that are neither object nor region are padding, or not used.

    Attributes:
        boxes: float32 [B, G, 4] x0, y0, x1, y1 in pixels, inside the image.
        labels: int64 [B, G] category ids.
        is_object: bool [B, G].
        is_region: bool [B, G] where anchors and RoIs that match no object are ignored.
        has_mask: bool [B, G].
        by_box: bool [B, G] objects without a mask of the source whose box trains the mask branch; None for none at all.
        mask_weight: float32 [B, G] of a mask in the mask loss; None if all weigh 1.
    """

    boxes: Tensor
    labels: Tensor
    is_object: Tensor
    is_region: Tensor
    has_mask: Tensor
    by_box: Tensor | None = None
    mask_weight: Tensor | None = None

    def rows(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return what matching compares: boxes, is_object and is_region."""
        return self.boxes, self.is_object, self.is_region


def verified_at(boxes: Tensor, images: Tensor, tiles: Tensor, verified: Tensor) -> Tensor:
    """Return the classes that are verified in every tile that a RoI touches: bool [K, C].

    Args:
        boxes: float32 [K, 4] of RoIs, inside their images.
        images: int64 [K] the image of each.
        tiles, verified: of a `Batch`.
    """
    if tiles.shape[1] == 1:
        return verified[images, 0]
    own = tiles[images]  # [K, T, 4]
    touches = (boxes[:, None, :2] <= own[..., 2:]) & (boxes[:, None, 2:] >= own[..., :2])  # [K, T, 2]
    return (verified[images] | ~touches.all(dim=2, keepdim=True)).all(dim=1)


def ground_truth_of(batch: Batch, loss: LossConfig) -> GroundTruth:
    """Return the annotations of a batch under the given treatment of incomplete ones."""
    group, has_mask = (batch.flags & GROUP_OF) > 0, (batch.flags & HAS_MASK) > 0
    mask_weight = None
    if loss.predicted != 1:
        is_predicted = (batch.flags & PREDICTED) > 0
        mask_weight = torch.ones_like(is_predicted, dtype=torch.float32).masked_fill(is_predicted, loss.predicted)
        has_mask = has_mask & (mask_weight > 0)
    is_region = (batch.flags & IGNORED) > 0
    is_object = (batch.labels > 0) & ~is_region
    if loss.unmasked == "background":
        is_object = is_object & (has_mask | group)
    if loss.group_of != "object":
        is_object = is_object & ~group
    if loss.group_of == "ignore":
        is_region = is_region | group
    by_box = None
    if loss.unmasked == "masks":
        has_source_mask = (batch.flags & (HAS_MASK | PREDICTED)) == HAS_MASK
        by_box = is_object & ~has_source_mask & ~group & ((batch.flags & LOOSE) == 0)
    return GroundTruth(batch.boxes, batch.labels, is_object, is_region, has_mask, by_box, mask_weight)
