from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder import openimages
from builder.annotations import (
    JOIN_TOLERANCE,
    SplitTables,
    annotate,
    images_by_class,
    match_boxes,
    read_metadata,
    read_split,
    read_verified,
)
from builder.classes import Classes, Taxonomy
from builder.openimages import OpenImages, source_location
from builder.tables import read_table
from shards.storage import Location

WILD = Path(__file__).parents[2].parent / "shared" / "openimages-sample" / "wild"
CLASSES = Taxonomy(
    {"/m/01g317": "Person", "/m/04yx4": "Man", "/m/0k4j": "Car"}, {"/m/01g317": frozenset(["/m/04yx4"])}
).choose(["Person", "Car"])

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


def read(root: Path, boxes: Sequence[str], masks: Sequence[str]) -> tuple[SplitTables, Classes]:
    return read_split(write_mirror(root, boxes, masks), "validation", CLASSES), CLASSES


def test_every_annotation_is_kept_and_joined_by_the_nearest_box(tmp_path: Path) -> None:
    tables, classes = read(
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
    objects = annotate(tables, classes, ["a1"])["a1"]
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
    tables, classes = read(tmp_path, boxes * 3, masks * 2)
    [only] = annotate(tables, classes, ["a1"])["a1"]
    assert only.mask_path


def test_rows_that_cannot_be_used_are_left_out_with_a_word(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tables, classes = read(
        tmp_path,
        boxes=[
            box("a1", "/m/0k4j", "0.5,0.4,0.1,0.2"),
            box("a1", "/m/0k4j", "nan,0.4,0.1,0.2"),
            box("a1", "/m/0k4j", ",0.4,0.1,0.2"),
            box("a1", "/m/0k4j", "1.1,1.4,0.1,0.2"),
            box("a1", "/m/0k4j", "-0.1,1.4,0.1,0.2"),  # sticks out: clipped, not dropped
            box("../../etc", "/m/0k4j", "0.1,0.4,0.1,0.2"),
        ],
        masks=[mask("a1", "/m/01g317", ",,nan,", "b1")],
    )
    assert "4 boxes" in caplog.text
    assert "impossible ImageID" in caplog.text
    car, person = annotate(tables, classes, ["a1"])["a1"]
    assert car.box == (-0.1, 1.4, 0.1, 0.2)
    assert person.box == (0, 0, 0, 0)  # the packer takes it from the mask


def test_an_image_counts_by_masks_and_without_any_mask_of_the_class_by_boxes(tmp_path: Path) -> None:
    tables, classes = read(
        tmp_path,
        boxes=[
            box("a1", "/m/01g317", "0.1,0.2,0.1,0.2"),
            box("a2", "/m/01g317", "0.1,0.2,0.1,0.2"),
            box("a3", "/m/0k4j", "0.1,0.2,0.1,0.2"),
        ],
        masks=[mask("a1", "/m/04yx4", "0.1,0.2,0.1,0.2", "b1")],
    )
    assert images_by_class(tables, classes) == {1: ["a1"], 2: ["a3"]}


def test_verified_labels_and_metadata_are_read_for_the_images_asked_for(tmp_path: Path) -> None:
    source = write_mirror(tmp_path, [], [])
    source.labels("validation").write(
        b"ImageID,Source,LabelName,Confidence\na1,v,/m/04yx4,1\na1,v,/m/0k4j,0\na1,m,/m/0k4j,0.7\na2,v,/m/0k4j,1\n"
    )
    assert read_verified(source, "validation", CLASSES, ["a1"]) == {
        "a1": (frozenset(["/m/04yx4"]), frozenset(["/m/0k4j"]))
    }
    header = ",".join(openimages.METADATA_COLUMNS)
    source.metadata("validation").write(
        f'{header}\na1,http://o,http://l,http://p,"Zoë, ""Z""","two\nlines",270.0\na2,,,,,,\n'.encode()
    )
    found = read_metadata(source, "validation", ["a1", "a2"])
    assert (found["a1"].author, found["a1"].title, found["a1"].rotation) == ('Zoë, "Z"', "two\nlines", 270)
    assert found["a2"].rotation == 0


@pytest.mark.skipif(not WILD.is_dir(), reason=f"{WILD} is not here")
def test_wild_rows_parse_also_a_mid_that_ends_in_an_underscore() -> None:
    location = Location(str(WILD / "train-annotations-object-segmentation.sample.csv"))
    table = read_table(location, openimages.MASK_COLUMNS, {"LabelName": pa.array(["/m/01jfm_", "/m/0k4j"])})
    assert table.num_rows == 9
    [plate] = [row for row in table.to_pylist() if row["LabelName"] == "/m/01jfm_"]
    assert plate["MaskPath"] == "e8060b80552da6b2_m01jfm__2fd9f4ca.png"
    assert plate["BoxID"] == "2fd9f4ca"
    assert plate["PredictedIoU"] == 0.92198
