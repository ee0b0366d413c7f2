import pytest

from builder.sources.coco_categories import CocoCategory, arrange
from tests.builder.coco_scenes import IMAGE
from tests.builder.sources.test_coco import opened

FISH, CUP = CocoCategory(1, "fish", "fish"), CocoCategory(2, "cup", "fish")


def test_a_root_without_annotations_is_no_class(caplog: pytest.LogCaptureFixture) -> None:
    categories = [CocoCategory(0, "fishes"), CocoCategory(1, "fish", "fishes"), CocoCategory(2, "cup", "fishes")]
    names, parents = arrange(categories, {1, 2}, "x.json")
    assert (names, parents) == ({1: "fish", 2: "cup"}, {"fish": "fishes", "cup": "fishes"})
    assert caplog.messages == ["x.json: category 0, 'fishes', only groups others and has no annotations: left out"]
    assert arrange(categories, {0, 1}, "x.json")[0] == {0: "fishes", 1: "fish", 2: "cup"}


def test_a_root_named_as_a_class_is_dropped_and_does_not_become_that_class(caplog: pytest.LogCaptureFixture) -> None:
    for root in (CocoCategory(0, "fish"), CocoCategory(0, "fish", "fish")):
        caplog.clear()
        assert arrange([root, FISH, CUP], {1, 2}, "x.json") == ({1: "fish", 2: "cup"}, {})
        assert caplog.messages == ["x.json: category 0, a second 'fish' without annotations: left out"]
    names, parents = arrange([FISH, CUP, CocoCategory(7, "cup")], {1}, "x.json")  # a twin that groups nothing
    assert (names, parents) == ({1: "fish", 2: "cup"}, {"cup": "fish"})


def test_supercategories_in_a_circle_are_ignored(caplog: pytest.LogCaptureFixture) -> None:
    circle = [CocoCategory(n, name, parent) for n, name, parent in ((1, "a", "b"), (2, "b", "a"), (3, "c", "a"))]
    names, parents = arrange(circle, {1, 2, 3}, "x.json")
    assert (names, parents) == ({1: "a", 2: "b", 3: "c"}, {"c": "a"})
    assert caplog.messages == ["x.json: supercategories go round in a circle: those of a, b are ignored"]


@pytest.mark.parametrize(
    "rows",
    [
        [(0, "pets", "none"), (1, "dog", "pets"), (2, "cat", "pets")],
        [(0, "dog", "none"), (1, "dog", "dog"), (2, "cat", "dog")],
        [(1, "dog", "cat"), (2, "cat", "dog")],
    ],
)
def test_objects_keep_their_own_class(rows: list[tuple[int, str, str]]) -> None:
    categories = [{"id": number, "name": name, "supercategory": parent} for number, name, parent in rows]
    images = [{**IMAGE, "id": number, "file_name": f"{number}.jpg"} for number in range(4)]
    annotations = [{"image_id": n, "category_id": 1 + n % 2, "bbox": [1, 1, 4, 4]} for n in range(4)]
    split = opened({"images": images, "categories": categories, "annotations": annotations})
    assert [category.name for category in split.classes.categories] == ["cat", "dog"]
    described = split.describe([f"{n:012d}" for n in range(4)])
    dog, cat = 2, 1
    for number, image in enumerate(described.values()):
        own, other = (cat, dog) if number % 2 else (dog, cat)
        assert [planned.annotation.category_id for planned in image.objects] == [own]
        assert (image.verified_present, image.verified_absent) == ((own,), (other,))
