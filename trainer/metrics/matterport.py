"""The per-image metrics of matterport's Mask_RCNN (`mrcnn/utils.py`), with their names, arguments and return values.

    from trainer.metrics.matterport import compute_ap
    AP, precisions, recalls, overlaps = compute_ap(
        gt_bbox, gt_class_id, gt_mask, r["rois"], r["class_ids"], r["scores"], r["masks"])

Boxes are y1, x1, y2, x2 in pixels, masks [H, W, N]; rows of zeros are padding. Some errors of matterport are fixed:

- An object is found once. In matterport before October 2018, the object found by the first prediction can be found
  again (`gt_match[j] > 0`), so that duplicates raise the AP.
- Padding may be at any position, and is removed with its class, score and mask. matterport cuts scores and the masks of
  objects at the end, and classes not at all.
- Predictions of equal score keep their order; matterport reverses it.
- An image without objects has no AP and no recall: NaN, to be averaged by `np.nanmean`. In matterport the AP is 0 or
  NaN, depending on the predictions, and the recall an error.
- `compute_ap_range` takes arrays of thresholds. Its default contains 0.8, where `np.arange(0.5, 1.0, 0.05)` is slightly
  above.
- `compute_recall` matches boxes one to one: a prediction that overlaps two objects does not take one that another
  prediction needs.

The mean of such APs over images is not COCO's or Open Images' AP, which rank the detections of all images together.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from pycocotools import mask as coco_mask

from trainer.metrics.overlaps import compute_iou, match_greedily

Floats = NDArray[np.float64]


def compute_ap(
    gt_boxes: ArrayLike,
    gt_class_ids: ArrayLike,
    gt_masks: ArrayLike,
    pred_boxes: ArrayLike,
    pred_class_ids: ArrayLike,
    pred_scores: ArrayLike,
    pred_masks: ArrayLike,
    iou_threshold: float = 0.5,
) -> tuple[float, Floats, Floats, Floats]:
    """Compute the average precision of one image at one mask IoU, over all classes together.

    Args:
        gt_boxes: [M, 4] y1, x1, y2, x2; rows of zeros are padding.
        gt_class_ids: int [M].
        gt_masks: [H, W, M], bool or numbers; an object is where they are above 0.5.
        pred_boxes, pred_class_ids, pred_masks: likewise, of N predictions.
        pred_scores: [N].
        iou_threshold: smallest mask IoU of a match, above 0 and up to 1.

    Returns:
        mAP: the area under the precision envelope, 0 to 1; NaN without objects.
        precisions: [N + 2] the envelope after each prediction by descending score, with the values at recall 0 and 1
            around it.
        recalls: [N + 2] likewise.
        overlaps: [N, M] mask IoU, predictions by descending score.

    Raises:
        ValueError: arrays of different lengths, masks of different sizes, a score that is NaN, an IoU out of range.
    """
    _check_iou("iou_threshold", iou_threshold)
    found, overlaps = _match(
        (gt_boxes, gt_class_ids, gt_masks), (pred_boxes, pred_class_ids, pred_masks), pred_scores, iou_threshold
    )
    objects = overlaps.shape[1]
    hits = np.cumsum(found, dtype=np.float64)
    with np.errstate(invalid="ignore"):  # 0 of 0 objects: NaN
        recalls = np.concatenate([[0.0], hits / np.float64(objects), [1.0]])
    precisions = np.concatenate([[0.0], hits / np.arange(1, len(found) + 1), [0.0]])
    precisions = np.maximum.accumulate(precisions[::-1])[::-1].copy()
    area = float(np.sum(np.diff(recalls) * precisions[1:])) if objects else float("nan")
    return area, precisions, recalls, overlaps


def compute_ap_range(
    gt_box: ArrayLike,
    gt_class_id: ArrayLike,
    gt_mask: ArrayLike,
    pred_box: ArrayLike,
    pred_class_id: ArrayLike,
    pred_score: ArrayLike,
    pred_mask: ArrayLike,
    iou_thresholds: Sequence[float] | Floats | None = None,
    verbose: int = 1,
) -> float:
    """Compute the mean of `compute_ap` over several IoUs, 0.50 to 0.95 by default; `verbose` prints them."""
    thresholds = np.arange(50, 100, 5) / 100 if iou_thresholds is None else np.asarray(iou_thresholds, dtype=np.float64)
    if not thresholds.size:
        raise ValueError("iou_thresholds is empty: give at least one, or None for 0.50 to 0.95")
    values = []
    for threshold in thresholds:
        value, *_ = compute_ap(
            gt_box, gt_class_id, gt_mask, pred_box, pred_class_id, pred_score, pred_mask, iou_threshold=threshold
        )
        if verbose:
            print(f"AP @{threshold:.2f}:\t {value:.3f}")
        values.append(value)
    mean = float(np.mean(values))
    if verbose:
        print(f"AP @{thresholds[0]:.2f}-{thresholds[-1]:.2f}:\t {mean:.3f}")
    return mean


def compute_recall(pred_boxes: ArrayLike, gt_boxes: ArrayLike, iou: float) -> tuple[float, NDArray[np.int64]]:
    """Compute the share of objects that boxes overlap, whatever their classes.

    Args:
        pred_boxes: [N, 4] y1, x1, y2, x2 in pixels, by descending score: each is matched with the free object that it
            overlaps most.
        gt_boxes: [M, 4]; in both, rows of zeros are padding.
        iou: smallest box IoU of a match, above 0 and up to 1.

    Returns:
        recall: the share of the objects that are matched; NaN without objects.
        positive_ids: [P] the rows of `pred_boxes` that overlap any object by `iou` or more, free or not.

    Raises:
        ValueError: `iou` is out of range.
    """
    _check_iou("iou", iou)
    predicted, truth = (np.asarray(boxes, dtype=np.float64).reshape(-1, 4) for boxes in (pred_boxes, gt_boxes))
    truth = truth[_present(truth)]  # padding among the predictions overlaps nothing
    if not len(truth):
        return float("nan"), np.empty(0, dtype=np.int64)
    overlaps = compute_iou(_as_xywh(predicted), _as_xywh(truth))
    recall = float((match_greedily(overlaps, iou) >= 0).sum() / len(truth))
    return recall, np.flatnonzero(overlaps.max(axis=1, initial=0.0) >= iou)


def _match(truth: Any, predicted: Any, scores: ArrayLike, threshold: float) -> tuple[NDArray[np.bool_], Floats]:
    """Return whether each prediction finds an object of its class, bool [N], and all overlaps, by descending score."""
    _, gt_ids, gt_masks = _without_padding(*truth, name="gt")
    kept, pred_ids, pred_masks = _without_padding(*predicted, name="pred")
    scores = np.asarray(scores, dtype=np.float64)
    if len(scores) < len(kept):
        raise ValueError(f"{len(scores)} pred_scores for {len(kept)} pred_boxes")
    scores = scores[: len(kept)][kept]
    if np.isnan(scores).any():
        raise ValueError(f"pred_scores contains NaN, {np.isnan(scores).sum()} of {len(scores)}: NaN cannot be sorted")
    sizes = [masks.shape[:2] for masks in (gt_masks, pred_masks)]
    if len(gt_ids) and len(pred_ids) and sizes[0] != sizes[1]:
        raise ValueError(
            f"gt_masks are {sizes[0][0]} x {sizes[0][1]} (height x width), pred_masks {sizes[1][0]} x {sizes[1][1]}: "
            "both must have the image's size"
        )
    order = np.argsort(-scores, kind="stable")
    overlaps = compute_iou(_encode(pred_masks[..., order]), _encode(gt_masks))
    same = pred_ids[order][:, None] == gt_ids[None, :]
    return match_greedily(np.where(same, overlaps, 0.0), threshold) >= 0, overlaps


def _without_padding(
    boxes: ArrayLike, ids: ArrayLike, masks: ArrayLike, *, name: str
) -> tuple[NDArray[np.bool_], NDArray[Any], NDArray[Any]]:
    """Return which boxes are not padding, and their classes and masks."""
    boxes, ids, masks = np.asarray(boxes).reshape(-1, 4), np.asarray(ids).reshape(-1), np.asarray(masks)
    kept = _present(boxes)
    count = len(kept)
    if not count and masks.ndim != 3:
        masks = np.zeros((1, 1, 0), dtype=np.uint8)
    if masks.ndim != 3:
        raise ValueError(f"{name}_masks has the shape {masks.shape}: it must be (H, W, {count})")
    if len(ids) < count or masks.shape[-1] < count:
        raise ValueError(f"{count} {name}_boxes, {len(ids)} {name}_class_ids, {masks.shape[-1]} {name}_masks")
    return kept, ids[:count][kept], masks[..., :count][..., kept]


def _present(boxes: NDArray[Any]) -> NDArray[np.bool_]:
    return np.asarray((boxes != 0).any(axis=1))


def _check_iou(name: str, value: float) -> None:
    if not 0 < value <= 1:
        raise ValueError(f"{name} is {value}: it must be above 0 and up to 1")


def _encode(masks: NDArray[Any]) -> list[Any]:
    encoded: list[Any] = coco_mask.encode(np.asfortranarray((masks > 0.5).astype(np.uint8)))
    return encoded


def _as_xywh(boxes: Floats) -> Floats:
    return np.stack([boxes[:, 1], boxes[:, 0], boxes[:, 3] - boxes[:, 1], boxes[:, 2] - boxes[:, 0]], axis=1)
