"""matterport's metrics: worked by hand, compared with loops over pixels, and where they differ from matterport."""

import inspect
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trainer.metrics.matterport import compute_ap, compute_ap_range, compute_recall

SIZE = 40
Box = tuple[int, int, int, int]  # y1, x1, y2, x2
A, B, C = (0, 0, 10, 10), (0, 20, 10, 30), (20, 0, 30, 10)


def arrays(*entries: tuple[int, Box]) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Boxes, class ids and masks."""
    masks = np.zeros((SIZE, SIZE, len(entries)), bool)
    for i, (_, (y1, x1, y2, x2)) in enumerate(entries):
        masks[y1:y2, x1:x2, i] = True
    return np.array([b for _, b in entries]).reshape(-1, 4), np.array([c for c, _ in entries], int), masks


def score(truth: list[tuple[int, Box]], predicted: list[tuple[int, Box, float]], **more: Any) -> Any:
    boxes, ids, masks = arrays(*[(c, b) for c, b, _ in predicted])
    return compute_ap(*arrays(*truth), boxes, ids, np.array([s for _, _, s in predicted]), masks, **more)


def test_compute_ap_by_hand() -> None:
    value, precisions, recalls, overlaps = score([(1, A), (1, B)], [(1, B, 0.7), (1, A, 0.9), (1, C, 0.8)])
    assert value == pytest.approx(1 / 2 + 1 / 3)
    np.testing.assert_allclose(precisions, [1, 1, 2 / 3, 2 / 3, 0])
    np.testing.assert_allclose(recalls, [0, 0.5, 0.5, 1, 1])
    np.testing.assert_allclose(overlaps, [[1, 0], [0, 0], [0, 1]])  # in the order of the scores
    assert score([(1, A)], [(2, A, 0.9)])[0] == 0
    assert score([(1, A)], [(1, (0, 0, 10, 5), 0.9)])[0] == 1  # half is enough
    assert score([(1, A)], [(1, (0, 0, 10, 5), 0.9)], iou_threshold=0.51)[0] == 0
    # Without predictions, and without objects.
    value, precisions, recalls, overlaps = score([(1, A)], [])
    assert (value, precisions.tolist(), recalls.tolist(), overlaps.shape) == (0, [0, 0], [0, 1], (0, 1))
    for predicted in ([], [(1, A, 0.9)]):
        value, _, _, overlaps = score([], predicted)
        assert (np.isnan(value), overlaps.shape) == (True, (len(predicted), 0))


def test_an_object_is_found_once() -> None:
    # matterport finds A twice here, because the first prediction has the number 0, and says 1.0 at recall 2 of 2.
    value, _, recalls, _ = score([(1, A), (1, B)], [(1, A, 0.9), (1, A, 0.8)])
    assert value == 0.5
    assert recalls[2] == 0.5
    # The second may take another object that it covers as well.
    double = [(1, (0, 0, 10, 10)), (1, (0, 1, 10, 11))]
    assert score(double, [(1, (0, 0, 10, 10), 0.9), (1, (0, 0, 10, 10), 0.8)])[0] == 1


def test_padding_is_removed_at_any_position() -> None:
    pad = (0, 0, 0, 0)
    plain = score([(1, A), (2, B)], [(1, A, 0.9), (2, B, 0.8), (1, C, 0.85)])
    padded = score([(0, pad), (1, A), (2, B)], [(1, A, 0.9), (0, pad, 0.0), (2, B, 0.8), (1, C, 0.85), (0, pad, 0.0)])
    for value, expected in zip(padded, plain, strict=True):
        np.testing.assert_array_equal(value, expected)
    recall, positive = compute_recall([pad, A, B], [A, pad, C, pad], 0.5)
    assert (recall, positive.tolist()) == (0.5, [1])
    assert np.isnan(compute_recall([A], [pad], 0.5)[0])


@pytest.mark.parametrize("threshold", [0, -0.5, 1.01, float("nan")])
def test_an_iou_out_of_range_is_an_error(threshold: float) -> None:
    with pytest.raises(ValueError, match=f"iou_threshold is {threshold}: it must be above 0 and up to 1"):
        score([(1, A)], [(1, A, 0.9)], iou_threshold=threshold)
    with pytest.raises(ValueError, match=f"iou is {threshold}: it must be above 0 and up to 1"):
        compute_recall([A], [A], threshold)


def test_arrays_that_do_not_fit_together_are_an_error() -> None:
    boxes, ids, masks = arrays((1, A), (1, B))
    with pytest.raises(ValueError, match=r"pred_masks 30 x 40: both must have the image's size"):
        compute_ap(boxes, ids, masks, boxes, ids, [0.9, 0.8], masks[:30])
    with pytest.raises(ValueError, match="pred_scores contains NaN, 1 of 2"):
        compute_ap(boxes, ids, masks, boxes, ids, [0.9, np.nan], masks)
    with pytest.raises(ValueError, match=r"gt_masks has the shape \(40, 40\): it must be \(H, W, 1\)"):
        compute_ap(boxes[:1], ids[:1], masks[:, :, 0], boxes, ids, [0.9, 0.8], masks)
    with pytest.raises(ValueError, match="1 gt_boxes, 0 gt_class_ids, 1 gt_masks"):
        compute_ap([A], [], np.zeros((4, 4, 1)), [], [], [], np.zeros((4, 4, 0)))
    # Without predictions, or in padding, sizes and scores do not matter.
    assert compute_ap(boxes, ids, masks, [], [], [], np.zeros((9, 9, 0)))[0] == 0
    padded = np.concatenate([boxes, np.zeros((1, 4))])
    assert compute_ap(boxes, ids, masks, padded, [1, 1, 0], [0.9, 0.8, np.nan], masks[:, :, [0, 1, 0]])[0] == 1


def test_compute_ap_range(capsys: pytest.CaptureFixture[str]) -> None:
    truth, predicted = arrays((1, A)), arrays((1, (0, 0, 10, 8)))  # IoU 0.8
    boxes, ids, masks = predicted
    assert compute_ap_range(*truth, boxes, ids, [0.9], masks) == pytest.approx(0.7)  # 0.50 to 0.80
    out = capsys.readouterr().out.splitlines()
    assert (len(out), out[0], out[-1]) == (11, "AP @0.50:\t 1.000", "AP @0.50-0.95:\t 0.700")
    assert compute_ap_range(*truth, boxes, ids, [0.9], masks, iou_thresholds=np.array([0.7, 0.9]), verbose=0) == 0.5
    assert capsys.readouterr().out == ""
    with pytest.raises(ValueError, match="iou_thresholds is empty"):
        compute_ap_range(*truth, boxes, ids, [0.9], masks, iou_thresholds=[])


def test_compute_recall_matches_boxes_one_to_one() -> None:
    recall, positive = compute_recall([A, A, C], [A, B], 0.5)
    assert (recall, positive.tolist()) == (0.5, [0, 1])
    # Both predictions overlap the first object most; matterport loses the second one.
    truth = [(0, 0, 10, 10), (0, 4, 10, 14)]
    recall, positive = compute_recall([(0, 1, 10, 11), (0, 1, 10, 11)], truth, 0.5)
    assert (recall, positive.tolist()) == (1, [0, 1])
    assert compute_recall(np.zeros((0, 4)), [A], 0.5)[0] == 0
    assert np.isnan(compute_recall([A], np.zeros((0, 4)), 0.5)[0])


def slow_ap(truth: list[tuple[int, Box]], predicted: list[tuple[int, Box, float]], threshold: float) -> float:
    free, hits, points = list(range(len(truth))), 0, []
    for rank, (label, box, _) in enumerate(sorted(predicted, key=lambda p: -p[2]), start=1):
        reach = [(iou(box, truth[j][1]), -j) for j in free if truth[j][0] == label]
        if reach and max(reach)[0] >= threshold:
            free.remove(-max(reach)[1])
            hits += 1
        points.append((hits, hits / rank))
    # The mean over the objects of the best precision at or after the recall at which each is found.
    return sum(max([p for h, p in points if h >= k], default=0.0) for k in range(1, len(truth) + 1)) / len(truth)


def iou(a: Box, b: Box) -> float:
    _, _, masks = arrays((1, a), (1, b))
    return float(masks.all(axis=2).sum() / masks.any(axis=2).sum())


def test_agrees_with_the_slow_version() -> None:
    rng = np.random.default_rng(1)

    def box(near: Box = (8, 8, 16, 16)) -> Box:
        y1, x1, y2, x2 = (int(v) for v in np.array(near) + rng.integers(-3, 4, 4))
        return max(y1, 0), max(x1, 0), max(y2, y1 + 2, 2), max(x2, x1 + 2, 2)

    for _ in range(60):
        truth = [(int(rng.integers(1, 3)), box()) for _ in range(rng.integers(1, 5))]
        predicted = [(int(rng.integers(1, 3)), box(b), float(np.round(rng.random(), 1))) for _, b in truth * 2]
        for threshold in (0.3, 0.5, 0.75):
            expected = slow_ap(truth, predicted, threshold)
            assert score(truth, predicted, iou_threshold=threshold)[0] == pytest.approx(expected)


def test_arguments_are_those_of_matterport() -> None:
    """Names, order and defaults, as calls by position rely on them."""
    arrays_of = "gt_box{0} gt_class_id{1} gt_mask{1} pred_box{0} pred_class_id{1} pred_score{1} pred_mask{1}"
    for function, names in (
        (compute_ap, arrays_of.format("es", "s") + " iou_threshold=0.5"),
        (compute_ap_range, arrays_of.format("", "") + " iou_thresholds=None verbose=1"),
        (compute_recall, "pred_boxes gt_boxes iou"),
    ):
        parameters = inspect.signature(function).parameters.values()
        assert {one.kind for one in parameters} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        texts = [one.name if one.default is one.empty else f"{one.name}={one.default!r}" for one in parameters]
        assert " ".join(texts) == names
