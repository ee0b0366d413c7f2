from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.sources.base import Filters
from builder.sources.csv_tables import read_table
from builder.sources.openimages import layout as openimages
from builder.sources.openimages.annotations import OpenImagesSplit
from builder.sources.openimages.box_matching import JOIN_TOLERANCE, match_boxes
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from builder.sources.taxonomy import Classes, Taxonomy
from builder.tasks.candidates import Candidates
from builder.tasks.plan import Annotation, Withheld
from shards.storage.location import Location
from tests.support import REPOSITORY

WILD = REPOSITORY.parent / "shared" / "openimages-sample" / "wild"
TAXONOMY = Taxonomy(
    {"/m/01g317": "Person", "/m/04yx4": "Man", "/m/0k4j": "Car"}, {"/m/01g317": frozenset(["/m/04yx4"])}
)
KEEP_ALL = Filters()
CLASSES = TAXONOMY.choose(["Person", "Car"])
EMPTY_ZIP = b"PK\5\6" + bytes(18)  # an end record and nothing else

BOX_HEADER = ",".join(["ImageID", "Source", "LabelName", "Confidence", "XMin,XMax,YMin,YMax", *openimages.BOX_FLAGS])
MASK_HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"

rows_near_each_other = st.lists(
    st.tuples(st.integers(0, 2), st.integers(0, 12), st.integers(0, 12)), max_size=12
)  # group, and two coordinates in steps of a third of the tolerance


def as_arrays(rows: Sequence[tuple[int, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    groups = np.array([group for group, _, _ in rows], dtype=np.int64)
    boxes = np.array([[a, a + 50, b, b + 50] for _, a, b in rows], dtype=np.float64).reshape(-1, 4)
    return groups, boxes * (JOIN_TOLERANCE / 3)


@given(rows_near_each_other, rows_near_each_other)
def test_join_is_the_greedy_one_to_one_matching(
    masks: list[tuple[int, int, int]], boxes: list[tuple[int, int, int]]
) -> None:
    mask_groups, mask_boxes = as_arrays(masks)
    box_groups, box_boxes = as_arrays(boxes)
    found = match_boxes(mask_groups, mask_boxes, box_groups, box_boxes)

    pairs = [
        (np.abs(mask_boxes[m] - box_boxes[b]).max(), m, b)
        for m in range(len(masks))
        for b in range(len(boxes))
        if mask_groups[m] == box_groups[b]
    ]
    expected, taken = [-1] * len(masks), set()
    for distance, m, b in sorted(pairs):
        if distance <= JOIN_TOLERANCE and expected[m] < 0 and b not in taken:
            expected[m] = b
            taken.add(b)
    assert found.tolist() == expected


def test_join_never_meets_nan() -> None:
    one = np.zeros(1, dtype=np.int64)
    assert match_boxes(one, np.full((1, 4), np.nan), one, np.zeros((1, 4))).tolist() == [-1]


def write_mirror(root: Path, boxes: Sequence[str], masks: Sequence[str]) -> OpenImages:
    source = OpenImages(source_location(str(root / "images")), source_location(str(root / "annotations")))
    source.boxes("validation").write("\n".join([BOX_HEADER, *boxes, ""]).encode())
    source.masks("validation").write("\n".join([MASK_HEADER, *masks, ""]).encode())
    return source


def box(image: str, label: str, coordinates: str, flags: str = "0,0,0,0,0") -> str:
    return f"{image},xclick,{label},1,{coordinates},{flags}"


def mask(image: str, label: str, coordinates: str, box_id: str) -> str:
    return f"{image}_{label[1:].replace('/', '')}_{box_id}.png,{image},{label},{box_id},{coordinates},0.9,0.1 0.2 1"


def opened(
    root: Path, boxes: Sequence[str], masks: Sequence[str], filters: Filters = KEEP_ALL, classes: Classes = CLASSES
) -> OpenImagesSplit:
    source = write_mirror(root, boxes, masks)
    source.labels("validation").write(b"ImageID,Source,LabelName,Confidence\na1,v,/m/0k4j,1\n")
    source.metadata("validation").write(f"{','.join(openimages.METADATA_COLUMNS)}\na1,,,,,,\na9,,,,,,\n".encode())
    for digit in "0123456789abcdef":
        source.mask_zip("validation", digit).write(EMPTY_ZIP)
    return OpenImagesSplit(source, "validation", classes, filters)


def annotations(split: OpenImagesSplit, image_id: str = "a1") -> list[Annotation]:
    return [planned.annotation for planned in split.describe([image_id])[image_id].objects]


def test_every_annotation_is_kept_and_joined_by_the_nearest_box(tmp_path: Path) -> None:
    split = opened(
        tmp_path,
        boxes=[
            box("a1", "/m/01g317", "0.185000,0.5,0.2,0.3", "1,-1,0,0,1"),
            box("a1", "/m/01g317", "0.186000,0.5,0.2,0.3"),
            box("a1", "/m/04yx4", "0.185000,0.5,0.2,0.3"),  # another label: never joined to a Person's mask
            box("a1", "/m/0k4j", "0.1,0.2,0.1,0.2", "0,0,1,0,0"),
            box("a1", "/m/0jbk", "0.1,0.2,0.1,0.2"),
        ],
        masks=[
            mask("a1", "/m/01g317", "0.18599999999999998,0.5,0.2,0.3", "b1"),
            mask("a1", "/m/01g317", "0.7,0.8,0.7,0.8", "b2"),  # no box row: still an annotation
        ],
    )
    objects = annotations(split)
    told = [(o.category_id, o.label, o.box[0], o.box_id, o.is_group_of) for o in objects]
    assert told == [
        (1, "/m/01g317", 0.185, "", False),
        (1, "/m/01g317", 0.186, "b1", False),
        (1, "/m/04yx4", 0.185, "", False),
        (2, "/m/0k4j", 0.1, "", True),
        (1, "/m/01g317", 0.7, "b2", False),
    ]
    assert objects[0].is_occluded
    assert objects[0].is_inside
    assert not objects[0].is_truncated  # -1 is unknown
    assert objects[1].mask_path == "a1_m01g317_b1.png"
    assert objects[1].predicted_iou == 0.9


def test_repeated_rows_count_once(tmp_path: Path) -> None:
    boxes, masks = [box("a1", "/m/0k4j", "0.1,0.2,0.1,0.2")], [mask("a1", "/m/0k4j", "0.1,0.2,0.1,0.2", "b1")]
    [only] = annotations(opened(tmp_path, boxes * 3, masks * 2))
    assert only.mask_path


def test_objects_keep_the_tables_order_whatever_else_is_described(tmp_path: Path) -> None:
    boxes = [
        box(f"a{n % 7}", ("/m/0k4j", "/m/04yx4")[n % 2], f"0.{n:04d},0.99,{(n * 37) % 50 / 100},0.99")
        for n in range(2000)
    ]
    split = opened(tmp_path, boxes, [])
    alone = split.describe(["a1"])["a1"]
    assert alone == split.describe([f"a{n}" for n in range(7)])["a1"]
    left = [planned.annotation.box[0] for planned in alone.objects]
    assert left == sorted(left)


def test_rows_that_cannot_be_used_are_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = opened(
        tmp_path,
        boxes=[
            box("a1", "/m/0k4j", "0.5,0.4,0.1,0.2"),
            box("a1", "/m/0k4j", "nan,0.4,0.1,0.2"),
            box("a1", "/m/0k4j", ",0.4,0.1,0.2"),
            box("a1", "/m/0k4j", "1.1,1.4,0.1,0.2"),
            box("a1", "/m/0k4j", "0.1,1e9,0.1,0.2"),
            box("a1", "/m/0k4j", "0.1,inf,0.1,0.2"),
            box("a1", "/m/0k4j", "-0.1,1.4,0.1,0.2"),  # sticks out: the packer clips it
            box("../../etc", "/m/0k4j", "0.1,0.4,0.1,0.2"),
        ],
        masks=[
            mask("a1", "/m/01g317", ",,nan,", "b1"),
            mask("a1", "/m/0k4j", "0.1,0.4,0.1,0.2", "../../../b2"),
        ],
    )
    assert split.candidates() == {1: Candidates(("a1",)), 2: Candidates((), ("a1",))}
    assert "6 rows whose box is empty" in caplog.text
    assert "1 row with an impossible ImageID" in caplog.text
    assert "impossible ImageID" in caplog.text
    assert "impossible MaskPath" in caplog.text
    car, person = annotations(split)
    assert car.box == (-0.1, 1.4, 0.1, 0.2)
    assert person.box == (0, 0, 0, 0)  # the packer takes it from the mask


@pytest.mark.parametrize(("written", "read"), [("0.9", 0.9), ("", None), ("-1", None), ("nan", None), ("7e9", None)])
def test_an_estimate_outside_its_range_is_none(tmp_path: Path, written: str, read: float | None) -> None:
    row = mask("a1", "/m/0k4j", "0.1,0.2,0.1,0.2", "b1").replace(",0.9,", f",{written},")
    split = opened(tmp_path, [], [row], Filters(min_predicted_iou=0.5))
    [planned] = split.describe(["a1"])["a1"].objects
    assert planned.annotation.predicted_iou == read
    assert planned.has_mask


def test_images_with_masks_come_before_those_with_boxes_only(tmp_path: Path) -> None:
    boxes = [
        box("a1", "/m/01g317", "0.1,0.2,0.1,0.2"),
        box("a2", "/m/01g317", "0.1,0.2,0.1,0.2"),
        box("a3", "/m/0k4j", "0.1,0.2,0.1,0.2"),
    ]
    masks = [mask("a1", "/m/04yx4", "0.1,0.2,0.1,0.2", "b1")]
    split = opened(tmp_path, boxes, masks)
    assert split.candidates() == {1: Candidates(("a1",), ("a2",)), 2: Candidates((), ("a3",))}
    only_masks = replace(split, filters=Filters(require_mask=True))
    only_masks.layout.boxes("validation").delete()  # not even read
    assert {category: found.masked for category, found in only_masks.candidates().items()} == {1: ("a1",), 2: ()}


FLAGGED = [
    box("a1", "/m/0k4j", "0.1,0.2,0.1,0.2", "1,0,0,0,0"),
    box("a1", "/m/0k4j", "0.5,0.9,0.5,0.9", "0,0,0,0,0"),
    box("a2", "/m/0k4j", "0.1,0.2,0.1,0.2", "1,0,0,0,0"),
    box("a3", "/m/0k4j", "0.1,0.2,0.1,0.2", "0,0,0,1,1"),
]


@pytest.mark.parametrize(
    ("drop", "masked", "boxed", "left"),
    [
        ((), ("a1", "a2"), ("a3",), 2),
        (("occluded",), (), ("a1", "a3"), 1),
        (("occluded", "inside"), (), ("a1",), 1),
        (("depiction",), ("a1", "a2"), (), 2),
        (("truncated", "group-of"), ("a1", "a2"), ("a3",), 2),
    ],
)
def test_dropped_flags_take_their_masks_along_and_images_without_any_object(
    tmp_path: Path, drop: tuple[str, ...], masked: tuple[str, ...], boxed: tuple[str, ...], left: int
) -> None:
    masks = [mask(image, "/m/0k4j", "0.1,0.2,0.1,0.2", "b1") for image in ("a1", "a2")]
    split = opened(tmp_path, FLAGGED, masks, Filters(drop=drop))
    assert split.candidates()[2] == Candidates(masked, boxed)
    assert len(annotations(split)) == left


def test_masks_without_any_box_row_have_no_flags(tmp_path: Path) -> None:
    split = opened(tmp_path, [], [mask("a1", "/m/0k4j", "0.1,0.2,0.1,0.2", "b1")], Filters(drop=("occluded",)))
    assert split.candidates()[2] == Candidates(("a1",))


def test_a_mask_below_the_estimate_leaves_its_box(tmp_path: Path) -> None:
    low = mask("a1", "/m/0k4j", "0.1,0.2,0.1,0.2", "b1").replace(",0.9,", ",0.55,")
    boxes = [box(image, "/m/0k4j", "0.1,0.2,0.1,0.2") for image in ("a1", "a2")]
    split = opened(
        tmp_path, boxes, [low, mask("a2", "/m/0k4j", "0.1,0.2,0.1,0.2", "b2")], Filters(min_predicted_iou=0.6)
    )
    assert split.candidates()[2] == Candidates(("a2",), ("a1",))
    [planned] = split.describe(["a1"])["a1"].objects
    assert planned.mask == Withheld("mask-filtered", "predicted IoU 0.55, --min-predicted-iou is 0.6")
    assert not planned.has_mask
    assert planned.annotation.box == (0.1, 0.2, 0.1, 0.2)


def test_other_classes_of_an_image_are_kept_when_asked_for(tmp_path: Path) -> None:
    classes = TAXONOMY.choose(["Car"], others=True)
    boxes = [box("a1", label, "0.1,0.2,0.1,0.2") for label in ("/m/0k4j", "/m/04yx4", "/m/01g317")]
    split = opened(tmp_path, [*boxes, box("a2", "/m/04yx4", "0.1,0.2,0.1,0.2")], [], classes=classes)
    assert [category.name for category in classes.categories] == ["Car", "Man", "Person"]
    assert split.candidates() == {1: Candidates((), ("a1",))}
    assert [(o.category_id, o.label) for o in annotations(split)] == [(1, "/m/0k4j"), (2, "/m/04yx4"), (3, "/m/01g317")]


def test_images_are_found_by_any_table_and_never_by_a_path(tmp_path: Path) -> None:
    split = opened(tmp_path, [box("b2", "/m/0jbk", "0.1,0.2,0.1,0.2")], [])
    asked = ["a9", "b2", "c3", "../a9", "a9/../a9", ""]
    assert split.find(asked) == {"a9": "a9", "b2": "b2"}


def test_verified_labels_and_metadata_are_read_for_the_images_asked_for(tmp_path: Path) -> None:
    source = write_mirror(tmp_path, [], [])
    split = OpenImagesSplit(source, "validation", CLASSES, KEEP_ALL)
    source.labels("validation").write(
        b"ImageID,Source,LabelName,Confidence\na1,v,/m/04yx4,1\na1,v,/m/0k4j,0\na1,m,/m/0k4j,0.7\na2,v,/m/0k4j,1\n"
    )
    assert split.verified(["a1"]) == {"a1": (frozenset(["/m/04yx4"]), frozenset(["/m/0k4j"]))}
    header = ",".join(openimages.METADATA_COLUMNS)
    source.metadata("validation").write(
        f'{header}\na1,http://o,http://l,http://p,"Zoë, ""Z""","two\nlines",270.0\na2,,,,,,\n'
        "a3,,,,,,nan\na4,,,,,,45\na5,,,,,,-90\na6,,,,,,1e300\n".encode()
    )
    found = split.metadata([f"a{n}" for n in range(1, 7)])
    assert (found["a1"].author, found["a1"].title) == ('Zoë, "Z"', "two\nlines")
    assert [found[f"a{n}"].rotation for n in range(1, 7)] == [270, 0, 0, 0, 270, 0]


@pytest.mark.skipif(not WILD.is_dir(), reason=f"{WILD} is not here")
def test_wild_rows_parse_also_a_mid_that_ends_in_an_underscore() -> None:
    location = Location(str(WILD / "train-annotations-object-segmentation.sample.csv"))
    table = read_table(location, openimages.MASK_COLUMNS, {"LabelName": pa.array(["/m/01jfm_", "/m/0k4j"])})
    assert table.num_rows == 9
    [plate] = [row for row in table.to_pylist() if row["LabelName"] == "/m/01jfm_"]
    assert plate["MaskPath"] == "e8060b80552da6b2_m01jfm__2fd9f4ca.png"
    assert plate["BoxID"] == "2fd9f4ca"
    assert plate["PredictedIoU"] == 0.92198
