import json
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.packing.inline_masks import encode_inline
from builder.sources.base import Filters
from builder.sources.coco_instances import parse_instances
from builder.sources.listing import ListedSplit, sample_key
from builder.sources.taxonomy import Taxonomy
from builder.tasks.plan import InlineMask, cut_tasks, make_plan
from shards.common.errors import UserError
from shards.format.sample import KEY
from shards.storage.location import Location
from tests.builder.coco_scenes import IMAGE, document

TWICE = [{"id": 1, "name": "dog"}, {"id": 2, "name": "dog"}]
OBJECT = document()["annotations"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([], "no list 'images'"),
        (document(annotations=None), "no list 'annotations'"),
        (document(categories=[3]), "no list 'categories'"),
        (document(images=[{"id": 1}]), r"images\[0\]: 'file_name'"),
        (document(images=[{**IMAGE, "id": 1.5}]), "'id' is '1.5'"),
        (document(images=[{**IMAGE, "width": "10"}]), "'width'"),
        (document(images=[{**IMAGE, "width": -10}]), "-10x8"),
        (document(images=[{**IMAGE, "height": 10**9}]), "10x1000000000"),
        (document(images=[IMAGE, {**IMAGE, "id": "000000000001"}]), "are the same"),
        *[
            (document(images=[{**IMAGE, "file_name": name}]), "is not under --images")
            for name in (
                "/etc/passwd",
                "../a.jpg",
                "b/../../a.jpg",
                "b/..",
                "..\\a.jpg",
                "\\a.jpg",
                "b//a.jpg",
                "a\n.jpg",
                "",
            )
        ],
        (document(categories=[{"id": 1, "name": "dog"}, {"id": 1, "name": "cat"}]), "used before"),
        (document(categories=TWICE, annotations=[*OBJECT, {**OBJECT[0], "category_id": 2}]), "1 and 2 .*named 'dog'"),
        (document(categories=[{"id": 1, "name": " "}]), "empty"),
        (document(annotations=[{"image_id": 1, "category_id": 9}]), "no category 9"),
        (document(annotations=[{"category_id": 1}]), "'image_id'"),
        *[(data, "not JSON") for data in (b"", b"{", b"\xff", b"[" * 100_000, b'{"images": 1' + b"1" * 5000 + b"}")],
    ],
)
def test_parse_instances_refuses_wrong_files_with_one_line(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_instances(value if isinstance(value, bytes) else json.dumps(value).encode(), "x.json")
    assert str(caught.value).startswith("x.json: ")
    assert "\n" not in str(caught.value)


def test_names_of_files_as_windows_writes_them(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO")
    names = ("images\\a.jpg", ".\\b\\c.PNG", "d.jpg")
    images = [{**IMAGE, "id": number, "file_name": name} for number, name in enumerate(names)]
    parsed = parse_instances(json.dumps(document(images=images)).encode(), "x.json")
    assert [image.file_name for image in parsed.images.values()] == ["images/a.jpg", "b/c.PNG", "d.jpg"]
    assert caplog.messages == ["x.json: 2 file names with backslashes, read as folders"]
    whole = document(images=[{**IMAGE, "file_name": "C:\\data\\a.jpg"}])
    with pytest.raises(UserError, match=r"images\[0\]: the file_name 'C:/data/a\.jpg' is a whole path of Windows"):
        parse_instances(json.dumps(whole).encode(), "x.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
places = st.sampled_from(
    [
        *[("images", key) for key in (*IMAGE, "license", "flickr_url", "neg_category_ids")],
        *[("annotations", key) for key in ("id", "image_id", "category_id", "bbox", "segmentation", "iscrowd")],
        *[("categories", key) for key in ("id", "name", "supercategory")],
        ("annotations", "predicted_iou"),
        ("licenses", "id"),
    ]
)


@given(st.lists(st.tuples(places, json_values), min_size=1, max_size=3))
def test_any_value_is_planned_and_packed_or_refused(changes: list[tuple[tuple[str, str], Any]]) -> None:
    value = json.loads(json.dumps(document(licenses=[{"id": 1, "url": "x"}])))
    for (table, key), new in changes:
        value[table][0][key] = new
    try:
        parsed = parse_instances(json.dumps(value).encode(), "x.json")
    except UserError:
        return
    classes = Taxonomy({name: name for name in parsed.names}, {}).choose([])
    split = ListedSplit(Location("memory://x"), parsed, classes, Filters(min_predicted_iou=0.5, drop=("group-of",)))
    split.candidates()
    plan = make_plan(classes.categories, cut_tasks("train", list(split.describe(parsed.images).values()), 4))
    masks = [planned.mask for task in plan.tasks for image in task.images for planned in image.objects]
    for mask in masks:
        if isinstance(mask, InlineMask):
            encode_inline(mask, 10, 8)


def test_unusable_annotations_are_left_out_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    good = document()["annotations"][0]
    boxes = ([1, 1, 0, 4], [1, 1, -3, 4], None, [1, 1], [1, 1, math.inf, 2], [10**400, 1, 1, 1], [20, 1, 4, 4])
    bad = [*({**good, "bbox": bbox} for bbox in boxes), {**good, "image_id": 77}]
    parsed = parse_instances(json.dumps(document(annotations=[good, *bad])).encode(), "x.json")
    assert [found.box_id for found in parsed.images["000000000001"].objects] == ["5"]
    assert "7 annotations with neither a mask nor a box" in caplog.text
    assert "1 annotation of images that it does not list" in caplog.text


ids = st.integers() | st.text(max_size=80)


@given(ids, ids, st.sampled_from(["", "train-"]))
def test_sample_keys_are_valid_and_differ(one: int | str, other: int | str, prefix: str) -> None:
    keys = [sample_key(image_id, prefix) for image_id in (one, other)]
    assert all(KEY.fullmatch(key) for key in keys)
    texts = [f"{i:012d}" if isinstance(i, int) else i for i in (one, other)]
    assert (keys[0] == keys[1]) == (texts[0] == texts[1])


def test_sample_keys_do_not_change() -> None:
    assert sample_key(139) == "000000000139"
    assert sample_key("0001eeaf4aed83f9") == "0001eeaf4aed83f9"
    assert sample_key("a/b.c", "val-") == "val-a_b_c-155b629f1b6f"
