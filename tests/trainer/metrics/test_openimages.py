"""The Open Images metric: each rule worked by hand, and compared with a slow version."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from shards.common.errors import UserError
from shards.format import rle
from shards.format.dataset import Category
from shards.format.sample import Instance
from shards.storage.location import Location
from tests.trainer.metrics import scenes
from tests.trainer.metrics.reference import open_images_ap
from tests.trainer.metrics.scenes import CAR, CATEGORIES, MAN, PERSON, Box, Pair, found, instance, sample
from trainer.metrics.hierarchy import read_parents
from trainer.metrics.openimages import OUTCOMES, UNVERIFIED, OpenImagesMetric, OpenImagesResult, Parents, match
from trainer.metrics.overlaps import EvaluatedImage, compute_overlaps
from trainer.model.inference import Detections

PARENTS: Parents = {MAN: (PERSON,)}
A, B, C, D = (0, 0, 10, 10), (20, 0, 10, 10), (0, 20, 10, 10), (20, 20, 10, 10)
NO_PIXEL = rle.encode(np.zeros((scenes.SIZE, scenes.SIZE), np.uint8))


def persons(*boxes: Box) -> Detections:
    """Detections of persons by descending score."""
    return found(*((PERSON, box, 0.9 - 0.1 * i) for i, box in enumerate(boxes)))


def score(*pairs: Pair, parents: Parents | None = None) -> OpenImagesResult:
    return scenes.evaluate(OpenImagesMetric(CATEGORIES, parents), *pairs)


def aps(*pairs: Pair, parents: Parents | None = None) -> list[float | None]:
    return [one.ap for one in score(*pairs, parents=parents).classes]


TWO = (instance(PERSON, A), instance(PERSON, B))
OVERLAPPING = (instance(PERSON, A), instance(PERSON, (0, 1, 10, 10)))
B_UNMASKED, A_UNMASKED_AND_A = (TWO[0], instance(PERSON, B, mask=False)), (instance(PERSON, A, mask=False), TWO[0])
B_NO_PIXEL = (TWO[0], replace(TWO[1], segmentation=NO_PIXEL))
IN_A_GROUP = (instance(PERSON, D), instance(PERSON, (15, 15, 25, 25), mask=False, group=True))
# Annotations, detections, AP, and the outcome of each detection by descending score.
CASES = {
    "all found": (TWO, persons(A, B), 1, "right right"),
    "nothing found": (TWO, persons(), 0, ""),
    # Precision 1, 1/2, 2/3 at recall 1/2, 1/2, 1. The envelope: 1 up to 1/2, then 2/3.
    "area as in VOC 2010": (TWO, persons(A, C, B), 1 / 2 + 1 / 3, "right wrong right"),
    "half of the recall is not reached": (TWO, persons(C, A), 1 / 4, "wrong right"),
    "IoU of half is enough": (TWO[:1], persons((0, 0, 5, 10)), 1, "right"),
    "IoU below half": (TWO[:1], persons((0, 0, 10, 4)), 0, "wrong"),
    "found once, by the best score": (TWO, found((PERSON, A, 0.8), (PERSON, A, 0.9)), 1 / 2, "right wrong"),
    "only the largest overlap counts, as in VOC": (OVERLAPPING, persons(A, (0, 0, 10, 9)), 1 / 2, "right wrong"),
    "an object without a mask is not in the recall": (B_UNMASKED, persons(A), 1, "right"),
    "one detection of it is ignored": (B_UNMASKED, persons(B, B, A), 1 / 2, "unmasked wrong right"),
    "masks are matched before boxes": (A_UNMASKED_AND_A, persons(A, A, A), 1, "right unmasked wrong"),
    "an annotated mask without a pixel is none": (B_NO_PIXEL, persons(B, A), 1, "unmasked right"),
    "a detection without a pixel": (TWO[:1], replace(persons(C), masks=(NO_PIXEL,)), 0, ""),
    "an object inside a group": (IN_A_GROUP, persons(D, D), 1, "right group"),
}


@pytest.mark.parametrize(("instances", "detections", "ap", "outcomes"), CASES.values(), ids=CASES)
def test_outcomes_in_one_image(
    instances: tuple[Instance, ...], detections: Detections, ap: float, outcomes: str
) -> None:
    one = sample(*instances)
    assert aps((one, detections))[0] == pytest.approx(ap)
    assert " ".join(OUTCOMES[i] for i in match(EvaluatedImage(one, detections), {}).outcomes) == outcomes


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize(
    ("label", "boxes", "ap", "ignored"),
    [
        (PERSON, [(20, 20, 4, 4), (25, 20, 4, 4), (30, 20, 4, 4)], 1, 3),
        (PERSON, [(18, 20, 4, 4)], 1, 1),  # half of its own area inside
        (PERSON, [(17, 20, 4, 4)], 0.5, 0),
        (CAR, [(20, 20, 4, 4)], 0.5, 0),  # a group of another class
    ],
)
def test_detections_inside_a_group_are_ignored(
    label: int, boxes: list[Box], ap: float, ignored: int, mask: bool
) -> None:
    group = instance(label, (20, 20, 20, 20), mask=mask, group=True)
    person = score((sample(TWO[0], group), persons(*boxes, A))).classes[0]
    assert (person.ap, person.outcomes["group"], person.objects) == (ap, ignored, 1)


def test_classes_without_an_object_with_a_mask_have_no_ap() -> None:
    one = sample(instance(PERSON, A), instance(CAR, B), instance(MAN, C, mask=False))
    result = score((one, found((PERSON, A, 0.9), (MAN, C, 0.9))))
    assert [c.ap for c in result.classes] == [1, 0, None]
    assert result.ap == 0.5
    assert score((sample(), found())).ap is None
    assert aps((sample(present=(PERSON,)), persons(A)))[0] is None


def test_detections_of_an_unverified_class_are_ignored() -> None:
    truth, wrong = (sample(instance(PERSON, B), name="truth"), found((PERSON, B, 0.5))), found((PERSON, C, 0.9))
    for one, ap in (
        (sample(name="unknown"), 1),
        (sample(instance(CAR, A), name="another class"), 1),
        (sample(name="present", present=(PERSON,)), 0.5),
        (sample(name="absent", absent=(PERSON,)), 0.5),
        (sample(instance(PERSON, D, mask=False, group=True), name="annotated"), 0.5),
    ):
        result = score(truth, (one, wrong))
        assert (result.classes[0].ap, result.count(UNVERIFIED)) == (ap, ap == 1), one.image_id
    # Verified labels hold for ancestors if present, and for descendants if absent.
    truth, wrong = (sample(instance(MAN, A), name="truth"), found((MAN, A, 0.5))), found((MAN, B, 0.9))
    for one, person, man in (
        (sample(present=(MAN,)), 0.5, 0.5),  # a man is a person: both are evaluated
        (sample(present=(PERSON,)), 0.5, 1),  # a person need not be a man
        (sample(absent=(PERSON,)), 0.5, 0.5),
        (sample(absent=(MAN,)), 1, 0.5),
    ):
        assert aps(truth, (one, wrong), parents=PARENTS) == [person, None, man]


@pytest.mark.parametrize(
    ("entries", "expected"),
    [
        (((MAN, A, 0.9), (PERSON, B, 0.8)), [1, None, 1]),
        (((PERSON, A, 0.9), (PERSON, B, 0.8)), [1, None, 0]),  # a man who is detected as a person is missed as a man
        (((MAN, A, 0.9), (PERSON, A, 0.85), (PERSON, B, 0.8)), [1 / 2 + 1 / 3, None, 1]),  # two persons for one
    ],
)
def test_a_child_counts_for_its_ancestors(
    entries: tuple[tuple[int, Box, float], ...], expected: list[float | None]
) -> None:
    result = score((sample(instance(MAN, A), instance(PERSON, B)), found(*entries)), parents=PARENTS)
    assert [None if c.ap is None else pytest.approx(c.ap) for c in result.classes] == expected
    assert [c.objects for c in result.classes] == [2, 0, 1]


def test_read_parents_of_the_official_tree(tmp_path: Path) -> None:
    kinds = [{"LabelName": "/m/x", "Subcategory": [{"LabelName": "/m/m"}]}]
    parts = [{"LabelName": "/m/m"}]
    tree = [{"LabelName": "/m/p", "Subcategory": kinds}, {"LabelName": "/m/c", "Part": parts}]
    place = Location(str(tmp_path / "tree.json"))
    place.write(json.dumps({"LabelName": "/m/entity", "Subcategory": tree}).encode())
    assert read_parents(place, CATEGORIES) == PARENTS
    message = r"tree.json: none of the dataset's classes \(1\) is in this hierarchy, such as '/m/z'"
    with pytest.raises(UserError, match=message):
        read_parents(place, [Category(1, "Zebra", "/m/z")])


def test_compute_overlaps_of_more_than_255_detections() -> None:
    """pycocotools counts masks in a byte where it returns their areas."""
    rng = np.random.default_rng(1)
    boxes = [(int(rng.integers(30)), int(rng.integers(30)), int(rng.integers(1, 10)), 5) for _ in range(300)]
    one = sample(*B_UNMASKED, instance(PERSON, C, group=True))
    many = found(*((PERSON, box, 1 - i / 300) for i, box in enumerate(boxes)))
    many = replace(many, masks=(*many.masks[:-1], NO_PIXEL))
    overlaps = compute_overlaps(one.instances, many)
    for i in range(0, 300, 23):
        single = compute_overlaps(one.instances, found((PERSON, boxes[i], 1.0)))
        assert np.array_equal(overlaps.values[i], single.values[0])
    assert np.flatnonzero(overlaps.empty).tolist() == [299]
    assert sum(score((one, many)).classes[0].outcomes.values()) == 299  # without the empty one


@pytest.mark.parametrize("nested", [False, True])
def test_agrees_with_the_slow_version(nested: bool) -> None:
    for seed in range(30):
        pairs = scenes.random_pairs(seed, 4)
        if nested:  # the slow version knows no descendants of absent labels
            absent = [{*one.verified_absent, *((MAN,) if PERSON in one.verified_absent else ())} for one, _ in pairs]
            pairs = [(replace(one, verified_absent=tuple(a)), d) for (one, d), a in zip(pairs, absent, strict=True)]
        result = aps(*pairs, parents=PARENTS if nested else {})
        for category, ap in zip(CATEGORIES, result, strict=True):
            expected = open_images_ap(pairs, category.id, {MAN} if nested and category.id == PERSON else set())
            assert ap == (None if expected is None else pytest.approx(expected, abs=1e-12)), seed
