"""The Open Images metric: each rule worked by hand, and against a slow version that only loops."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from shards.common.errors import UserError
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance, Sample
from shards.storage.location import Location
from trainer.metrics.hierarchy import read_parents
from trainer.metrics.openimages import GROUP, UNMASKED, UNVERIFIED, OpenImagesMetric, OpenImagesResult
from trainer.metrics.overlaps import compute_overlaps
from trainer.model.inference import Detections

PERSON, CAR, MAN = 1, 2, 3
CATEGORIES = (Category(PERSON, "Person", "/m/p"), Category(CAR, "Car", "/m/c"), Category(MAN, "Man", "/m/m"))
SIZE = 40
Box = tuple[int, int, int, int]  # x, y, w, h
A, B, C, D = (0, 0, 10, 10), (20, 0, 10, 10), (0, 20, 10, 10), (20, 20, 10, 10)


def filled(box: Box) -> rle.Rle:
    mask = np.zeros((SIZE, SIZE), np.uint8)
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    return rle.encode(mask)


def instance(label: int, box: Box, *, mask: bool = True, group: bool = False) -> Instance:
    return Instance(label, tuple(map(float, box)), filled(box) if mask else None, is_group_of=group)


def sample(
    *instances: Instance, name: str = "a", present: tuple[int, ...] = (), absent: tuple[int, ...] = ()
) -> Sample:
    return Sample(name, b"", SIZE, SIZE, instances, verified_present=present, verified_absent=absent)


def found(*entries: tuple[int, Box, float]) -> Detections:
    boxes = np.array([(x, y, x + w, y + h) for _, (x, y, w, h), _ in entries], np.float32).reshape(-1, 4)
    labels, scores = np.array([e[0] for e in entries], np.int64), np.array([e[2] for e in entries], np.float32)
    return Detections(boxes, labels, scores, tuple(filled(box) for _, box, _ in entries))


def rate(*pairs: tuple[Sample, Detections], parents: dict[int, tuple[int, ...]] | None = None) -> OpenImagesResult:
    metric = OpenImagesMetric(CATEGORIES, parents)
    for one, detections in pairs:
        metric.process([one], [detections])
    result = metric.evaluate()
    assert result is not None
    return result


def ap(*pairs: tuple[Sample, Detections], label: int = PERSON) -> float | None:
    return rate(*pairs).classes[label - 1].ap


def test_all_found_and_nothing_else_is_one_and_nothing_found_is_zero() -> None:
    one = sample(instance(PERSON, A), instance(PERSON, B))
    assert ap((one, found((PERSON, A, 0.9), (PERSON, B, 0.8)))) == 1
    assert ap((one, found())) == 0
    assert ap((sample(present=(PERSON,)), found((PERSON, A, 0.9)))) is None  # no object to find in any image
    assert rate((sample(), found())).ap is None


@pytest.mark.parametrize("count", [256, 500])
def test_more_detections_in_an_image_than_a_byte_counts(count: int) -> None:
    rng = np.random.default_rng(count)
    boxes: list[Box] = [(*rng.integers(0, 30, 2).tolist(), *rng.integers(1, 10, 2).tolist()) for _ in range(count)]
    one = sample(instance(PERSON, A), instance(PERSON, B, mask=False), instance(PERSON, C, group=True))
    detections = found(*((PERSON, box, 1 - i / count) for i, box in enumerate(boxes)))
    empty = rle.encode(np.zeros((SIZE, SIZE), np.uint8))
    detections = replace(detections, masks=(*detections.masks[:-1], empty))

    every = compute_overlaps(one.instances, detections)
    for i, mask in enumerate(detections.masks):  # each mask alone
        alone = replace(
            detections,
            boxes=detections.boxes[i : i + 1],
            labels=detections.labels[i : i + 1],
            scores=detections.scores[i : i + 1],
            masks=(mask,),
        )
        single = compute_overlaps(one.instances, alone)
        assert np.array_equal(every.values[i], single.values[0])
        assert every.empty[i] == single.empty[0] == (rle.decode(mask).sum() == 0)
    assert sum(rate((one, detections)).classes[0].outcomes.values()) == count - 1  # without the empty one


def test_the_area_is_that_of_voc_2010() -> None:
    one = sample(instance(PERSON, A), instance(PERSON, B))
    # Right, wrong, right: precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. The envelope: 1 up to 1/2, then 2/3.
    assert ap((one, found((PERSON, A, 0.9), (PERSON, C, 0.8), (PERSON, B, 0.7)))) == pytest.approx(1 / 2 + 1 / 3)
    # Wrong, right: precision 1/2 at recall 1/2; the other half of the recall is never reached.
    assert ap((one, found((PERSON, C, 0.9), (PERSON, A, 0.8)))) == pytest.approx(1 / 4)


def test_the_mean_is_over_the_classes_that_have_a_mask() -> None:
    one = sample(instance(PERSON, A), instance(CAR, B), instance(MAN, C, mask=False))
    result = rate((one, found((PERSON, A, 0.9), (MAN, C, 0.9))))
    assert [c.ap for c in result.classes] == [1, 0, None]
    assert result.ap == 0.5


def test_an_overlap_of_half_is_enough() -> None:
    one = sample(instance(PERSON, (0, 0, 10, 10)))
    assert ap((one, found((PERSON, (0, 0, 5, 10), 0.9)))) == 1  # 50 of 100
    assert ap((one, found((PERSON, (0, 0, 10, 4), 0.9)))) == 0


def test_an_object_is_found_once_and_by_the_best_score() -> None:
    one = sample(instance(PERSON, A), instance(PERSON, B))
    twice = found((PERSON, A, 0.8), (PERSON, A, 0.9), (PERSON, B, 0.7))
    assert ap((one, twice)) == pytest.approx(1 / 2 + 1 / 3)
    # A detection that overlaps a taken object most is wrong, also where it reaches another: as in VOC.
    close = sample(instance(PERSON, (0, 0, 10, 10)), instance(PERSON, (0, 1, 10, 10)))
    result = rate((close, found((PERSON, (0, 0, 10, 10), 0.9), (PERSON, (0, 0, 10, 9), 0.8))))
    assert result.classes[0].outcomes["right"] == 1
    assert result.classes[0].outcomes["wrong"] == 1


def test_detections_of_an_unverified_class_are_left_out() -> None:
    there = sample(instance(CAR, A))
    unknown, present, absent = (
        sample(name=n, present=p, absent=a)
        for n, p, a in (("unknown", (), ()), ("present", (PERSON,), ()), ("absent", (), (PERSON,)))
    )
    truth = sample(instance(PERSON, B), name="truth")
    good, bad = found((PERSON, B, 0.5)), found((PERSON, C, 0.9))
    assert ap((truth, good), (unknown, bad)) == 1
    assert ap((truth, good), (there, bad)) == 1  # another class's object says nothing of persons
    assert ap((truth, good), (present, bad)) == 0.5
    assert ap((truth, good), (absent, bad)) == 0.5
    assert rate((truth, good), (unknown, bad)).count(UNVERIFIED) == 1
    # A class with a box counts, whether it is in a list or not; so does one with a group.
    assert ap((truth, found((PERSON, B, 0.5), (PERSON, C, 0.9)))) == 0.5
    group = sample(instance(PERSON, D, mask=False, group=True), name="group")
    assert ap((truth, good), (group, bad)) == 0.5


def test_a_box_without_a_mask_takes_one_detection_out() -> None:
    one = sample(instance(PERSON, A), instance(PERSON, B, mask=False))
    assert ap((one, found((PERSON, A, 0.9)))) == 1  # it is not in the recall
    once = rate((one, found((PERSON, B, 0.95), (PERSON, A, 0.9))))
    assert (once.classes[0].ap, once.count(UNMASKED)) == (1, 1)
    twice = rate((one, found((PERSON, B, 0.95), (PERSON, B, 0.94), (PERSON, A, 0.9))))
    assert (twice.classes[0].ap, twice.count(UNMASKED)) == (0.5, 1)
    assert ap((one, found((CAR, B, 0.95), (PERSON, A, 0.9)))) == 1
    assert ap((one, found((CAR, B, 0.95))), label=CAR) is None


def test_masks_are_matched_before_boxes() -> None:
    # The same place once with a mask and once without: the first detection is right, the second is left out.
    one = sample(instance(PERSON, A, mask=False), instance(PERSON, A))
    result = rate((one, found((PERSON, A, 0.9), (PERSON, A, 0.8), (PERSON, A, 0.7))))
    assert result.classes[0].outcomes == {"right": 1, "wrong": 1, "unmasked": 1, "group": 0, "unverified": 0}


def test_an_empty_mask_is_no_mask() -> None:
    nothing = replace(instance(PERSON, B), segmentation=rle.encode(np.zeros((SIZE, SIZE))))
    result = rate((sample(instance(PERSON, A), nothing), found((PERSON, B, 0.95), (PERSON, A, 0.9))))
    assert (result.classes[0].ap, result.classes[0].objects, result.count(UNMASKED)) == (1, 1, 1)
    # And a detection without a pixel is none.
    empty = replace(found((PERSON, C, 0.99)), masks=(rle.encode(np.zeros((SIZE, SIZE))),))
    assert sum(rate((sample(instance(PERSON, A)), empty)).classes[0].outcomes.values()) == 0


@pytest.mark.parametrize("mask", [True, False])
def test_detections_inside_a_group_are_left_out(mask: bool) -> None:
    group = instance(PERSON, (20, 20, 20, 20), mask=mask, group=True)
    one = sample(instance(PERSON, A), group)
    inside = [(PERSON, (20 + dx, 20, 4, 4), 0.95) for dx in (0, 5, 10)]
    result = rate((one, found(*inside, (PERSON, A, 0.9))))
    assert (result.classes[0].ap, result.count(GROUP), result.classes[0].objects) == (1, 3, 1)
    # Half of its own area is enough, less is not; a small part of the group is.
    assert ap((one, found((PERSON, (18, 20, 4, 4), 0.95), (PERSON, A, 0.9)))) == 1
    assert ap((one, found((PERSON, (17, 20, 4, 4), 0.95), (PERSON, A, 0.9)))) == 0.5
    # Another class's group does not help.
    assert (
        ap((sample(instance(PERSON, A), replace(group, category_id=CAR)), found(*inside[:1], (PERSON, A, 0.9)))) == 0.5
    )


def test_an_object_inside_a_group_is_right() -> None:
    one = sample(instance(PERSON, D), instance(PERSON, (15, 15, 25, 25), mask=False, group=True))
    result = rate((one, found((PERSON, D, 0.9), (PERSON, D, 0.8))))
    assert (result.classes[0].ap, result.count(GROUP)) == (1, 1)


def test_a_child_counts_for_its_ancestors() -> None:
    parents = {MAN: (PERSON,)}
    one = sample(instance(MAN, A), instance(PERSON, B))
    detections = found((MAN, A, 0.9), (PERSON, B, 0.8))
    alone, expanded = rate((one, detections)), rate((one, detections), parents=parents)
    assert [(c.ap, c.objects) for c in alone.classes] == [(1, 1), (None, 0), (1, 1)]
    assert [(c.ap, c.objects) for c in expanded.classes] == [(1, 2), (None, 0), (1, 1)]
    # A man who is taken for a person is found as a person and missed as a man.
    result = rate((one, found((PERSON, A, 0.9), (PERSON, B, 0.8))), parents=parents)
    assert [c.ap for c in result.classes] == [1, None, 0]
    # Found as both, he is found twice as a person.
    result = rate((one, found((MAN, A, 0.9), (PERSON, A, 0.85), (PERSON, B, 0.8))), parents=parents)
    assert [c.ap for c in result.classes] == [pytest.approx(1 / 2 + 1 / 3), None, 1]


def test_verified_labels_go_up_when_present_and_down_when_absent() -> None:
    parents, truth = {MAN: (PERSON,)}, sample(instance(MAN, A), name="truth")
    for one, person, man in (
        (sample(present=(MAN,)), 0.5, 0.5),  # a man is a person: both are evaluated
        (sample(present=(PERSON,)), 0.5, 1),  # a person need not be a man
        (sample(absent=(PERSON,)), 0.5, 0.5),  # nobody at all
        (sample(absent=(MAN,)), 1, 0.5),
    ):
        result = rate((truth, found((MAN, A, 0.5))), (one, found((MAN, B, 0.9))), parents=parents)
        assert [c.ap for c in result.classes] == [person, None, man]


def test_parents_come_from_the_official_tree(tmp_path: Path) -> None:
    tree = {
        "LabelName": "/m/entity",
        "Subcategory": [
            {"LabelName": "/m/p", "Subcategory": [{"LabelName": "/m/x", "Subcategory": [{"LabelName": "/m/m"}]}]},
            {"LabelName": "/m/c", "Part": [{"LabelName": "/m/m"}]},
        ],
    }
    (tmp_path / "tree.json").write_text(json.dumps(tree))
    place = Location(str(tmp_path / "tree.json"))
    assert read_parents(place, CATEGORIES) == {MAN: (PERSON,)}
    with pytest.raises(
        UserError, match=r"tree.json: none of the dataset's classes \(1\) is in this hierarchy, such as '/m/z'"
    ):
        read_parents(place, [Category(1, "Zebra", "/m/z")])
    place.write(b"[1]")
    with pytest.raises(UserError, match="not Open Images' class hierarchy"):
        read_parents(place, CATEGORIES)


# An independent version: pixels and loops, one class after the other, nothing shared with the metric.


def slow_ap(pairs: list[tuple[Sample, Detections]], label: int, children: set[int]) -> float | None:
    kinds = {label, *children}
    verdicts: list[tuple[float, bool]] = []
    total = 0
    for one, detections in sorted(pairs, key=lambda pair: pair[0].image_id):
        truth = [i for i in one.instances if i.category_id in kinds]
        objects = [i for i in truth if i.segmentation is not None and not i.is_group_of]
        total += len(objects)
        evaluated = bool(truth) or bool(kinds & set(one.verified_present)) or label in one.verified_absent
        if not evaluated:
            continue
        mine = [k for k in range(len(detections)) if int(detections.labels[k]) in kinds]
        mine.sort(key=lambda k: -float(detections.scores[k]))
        state: dict[int, str] = {}
        taken: list[Instance] = []
        for k in mine:
            best, most = None, 0.0
            for obj in objects:
                value = mask_iou(detections.masks[k], obj.segmentation)
                if value > most:
                    best, most = obj, value
            if best is not None and most >= 0.5 and not any(best is t for t in taken):
                taken.append(best)
                state[k] = "right"
        for k in mine:
            for region in truth:
                if not region.is_group_of or region.segmentation is None or k in state:
                    continue
                if mask_share(detections.masks[k], region.segmentation) >= 0.5:
                    state[k] = "out"
        for k in mine:
            best, most = None, 0.0
            for obj in truth:
                if obj.segmentation is None and not obj.is_group_of:
                    value = box_iou(extent(detections.masks[k]), obj.bbox)
                    if value > most:
                        best, most = obj, value
            if k not in state and best is not None and most >= 0.5 and not any(best is t for t in taken):
                taken.append(best)
                state[k] = "out"
        for k in mine:
            for region in truth:
                if region.is_group_of and region.segmentation is None and k not in state:
                    own = extent(detections.masks[k])
                    if crossing(own, region.bbox) / (own[2] * own[3]) >= 0.5:
                        state[k] = "out"
        verdicts += [(float(detections.scores[k]), state.get(k) == "right") for k in mine if state.get(k) != "out"]
    if not total:
        return None
    verdicts.sort(key=lambda v: -v[0])
    points = []
    for k in range(len(verdicts)):
        hits = sum(right for _, right in verdicts[: k + 1])
        points.append((hits / total, hits / (k + 1)))
    area, before = 0.0, 0.0
    for k, (recall, _) in enumerate(points):
        area += (recall - before) * max(precision for _, precision in points[k:])
        before = recall
    return area


def mask_iou(one: rle.Rle, other: rle.Rle | None) -> float:
    assert other is not None
    a, b = rle.decode(one) > 0, rle.decode(other) > 0
    return float((a & b).sum() / (a | b).sum())


def mask_share(one: rle.Rle, region: rle.Rle) -> float:
    a, b = rle.decode(one) > 0, rle.decode(region) > 0
    return float((a & b).sum() / a.sum())


def extent(mask: rle.Rle) -> tuple[int, int, int, int]:
    rows, columns = np.nonzero(rle.decode(mask))
    return (
        int(columns.min()),
        int(rows.min()),
        int(columns.max() - columns.min() + 1),
        int(rows.max() - rows.min() + 1),
    )


def crossing(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    width = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    height = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    return max(width, 0) * max(height, 0)


def box_iou(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    both = crossing(a, b)
    return both / (a[2] * a[3] + b[2] * b[3] - both)


def random_pairs(seed: int, images: int) -> list[tuple[Sample, Detections]]:
    """Crowded images: objects of all kinds beside and over each other, detections near and far, equal scores too."""
    rng: np.random.Generator = np.random.default_rng(seed)

    def box(near: Box | None = None) -> Box:
        if near is None:
            x, y, w, h = (int(v) for v in (*rng.integers(0, SIZE - 12, 2), *rng.integers(4, 13, 2)))
        else:
            x, y, w, h = (int(v) for v in np.array(near) + rng.integers(-2, 3, 4))
        x, y = min(max(x, 0), SIZE - 3), min(max(y, 0), SIZE - 3)
        return x, y, min(max(w, 2), SIZE - x), min(max(h, 2), SIZE - y)

    pairs = []
    for number in rng.permutation(images):
        objects = [
            (int(rng.integers(1, 4)), box(), bool(rng.random() < 0.6), bool(rng.random() < 0.2))
            for _ in range(rng.integers(0, 7))
        ]
        near = [(label if rng.random() < 0.8 else int(rng.integers(1, 4)), box(b)) for label, b, _, _ in objects * 2]
        far = [(int(rng.integers(1, 4)), box()) for _ in range(rng.integers(0, 4))]
        scores: NDArray[np.float64] = np.round(rng.random(len(near) + len(far)), 2)
        entries = [(label, b, float(s)) for (label, b), s in zip([*near, *far], scores)]
        verified = rng.random(3)
        pairs.append(
            (
                sample(
                    *(instance(label, b, mask=mask, group=group) for label, b, mask, group in objects),
                    name=f"image{number}",
                    present=tuple(c for c in (1, 2, 3) if verified[c - 1] < 0.3),
                    absent=tuple(c for c in (1, 2, 3) if verified[c - 1] > 0.8),
                ),
                found(*entries),
            )
        )
    return pairs


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.integers(1, 6), st.booleans())
def test_agrees_with_the_slow_version(seed: int, images: int, nested: bool) -> None:
    pairs = random_pairs(seed, images)
    parents = {MAN: (PERSON,)} if nested else {}
    if nested:
        # The slow version knows no descendants of absent labels: what the builder would have written is given.
        pairs = [
            (
                replace(
                    one,
                    verified_absent=tuple({*one.verified_absent, *((MAN,) if PERSON in one.verified_absent else ())}),
                ),
                d,
            )
            for one, d in pairs
        ]
    result = rate(*pairs, parents=parents)
    for category, ours in zip(CATEGORIES, result.classes):
        expected = slow_ap(pairs, category.id, {MAN} if nested and category.id == PERSON else set())
        if expected is None:
            assert ours.ap is None
        else:
            assert ours.ap == pytest.approx(expected, abs=1e-12)


def test_any_split_over_ranks_gives_the_same_and_an_image_twice_is_noticed() -> None:
    pairs = random_pairs(5, 12)
    whole = rate(*pairs)
    assert 0.05 < (whole.ap or 0) < 0.95
    for world in (2, 3):
        ranks = [OpenImagesMetric(CATEGORIES) for _ in range(world)]
        for number, (one, detections) in enumerate(pairs):
            ranks[number % world].process([one], [detections])
        everything = [image for metric in ranks for image in metric._images]
        split = ranks[0].evaluate(lambda own: everything)  # noqa: B023
        assert split == whole
        assert ranks[1].evaluate(lambda own: None) is None
        with pytest.raises(RuntimeError, match="1 images were processed more than once, such as image"):
            ranks[0].evaluate(lambda own: [*everything, everything[0]])  # noqa: B023
        ranks[0].reset()
        empty = ranks[0].evaluate()
        assert empty is not None
        assert (empty.images, empty.ap) == (0, None)
