from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from builder.sources.base import Candidates, Filters
from builder.sources.openimages.annotations import OpenImagesSplit
from builder.sources.openimages.layout import BOX_FLAGS, METADATA_COLUMNS, Layout
from builder.sources.taxonomy import Classes, Taxonomy
from builder.tasks.plan import Annotation, Failure
from shards.storage.location import Location

TAXONOMY = Taxonomy(
    {"/m/01g317": "Person", "/m/04yx4": "Man", "/m/0k4j": "Car"}, {"/m/01g317": frozenset(["/m/04yx4"])}
)
CLASSES = TAXONOMY.choose(["Person", "Car"])
EMPTY_ZIP = b"PK\5\6" + bytes(18)  # an end record and nothing else

BOX_HEADER = ",".join(["ImageID", "Source", "LabelName", "Confidence", "XMin,XMax,YMin,YMax", *BOX_FLAGS])
MASK_HEADER = "MaskPath,ImageID,LabelName,BoxID,BoxXMin,BoxXMax,BoxYMin,BoxYMax,PredictedIoU,Clicks"
LABEL_HEADER = "ImageID,Source,LabelName,Confidence"
CORNERS = "0.1,0.2,0.1,0.2"


def box(image: str, label: str, coordinates: str = CORNERS, flags: str = "0,0,0,0,0") -> str:
    return f"{image},xclick,{label},1,{coordinates},{flags}"


def mask(image: str, label: str, box_id: str, coordinates: str = CORNERS, iou: str = "0.9") -> str:
    name = f"{image}_{label[1:].replace('/', '')}_{box_id}.png"
    return f"{name},{image},{label},{box_id},{coordinates},{iou},0.1 0.2 1"


def opened(
    root: Path,
    boxes: Sequence[str] = (),
    masks: Sequence[str] = (),
    labels: Sequence[str] = ("a1,v,/m/0k4j,1",),
    metadata: Sequence[str] = ("a1,,,,,,", "a9,,,,,,"),
    filters: Filters = Filters(),  # noqa: B008
    classes: Classes = CLASSES,
) -> OpenImagesSplit:
    """The validation split of a mirror with these rows."""
    layout = Layout(Location(str(root / "images")), Location(str(root / "annotations")))
    for location, lines in (
        (layout.boxes("validation"), [BOX_HEADER, *boxes]),
        (layout.masks("validation"), [MASK_HEADER, *masks]),
        (layout.labels("validation"), [LABEL_HEADER, *labels]),
        (layout.metadata("validation"), [",".join(METADATA_COLUMNS), *metadata]),
    ):
        location.write("\n".join([*lines, ""]).encode())
    layout.mask_zip("validation", "a").write(EMPTY_ZIP)
    return OpenImagesSplit(layout, "validation", classes, filters)


def annotations(split: OpenImagesSplit, image_id: str = "a1") -> list[Annotation]:
    return [planned.annotation for planned in split.describe([image_id])[image_id].objects]


def test_every_annotation_is_kept_and_masks_are_joined_to_the_nearest_box(tmp_path: Path) -> None:
    split = opened(
        tmp_path,
        boxes=[
            box("a1", "/m/01g317", "0.185000,0.5,0.2,0.3", "1,-1,0,0,1"),
            box("a1", "/m/01g317", "0.186000,0.5,0.2,0.3"),
            box("a1", "/m/04yx4", "0.185000,0.5,0.2,0.3"),  # another label: never joined to a Person's mask
            box("a1", "/m/0k4j", CORNERS, "0,0,1,0,0"),
            box("a1", "/m/0jbk"),
        ],
        masks=[
            mask("a1", "/m/01g317", "b1", "0.18599999999999998,0.5,0.2,0.3"),
            mask("a1", "/m/01g317", "b2", "0.7,0.8,0.7,0.8"),  # no box row: still an annotation
        ],
    )
    objects = annotations(split)
    assert [(o.category_id, o.label, o.box[0], o.box_id, o.is_group_of) for o in objects] == [
        (1, "/m/01g317", 0.185, "", False),
        (1, "/m/01g317", 0.186, "b1", False),
        (1, "/m/04yx4", 0.185, "", False),
        (2, "/m/0k4j", 0.1, "", True),
        (1, "/m/01g317", 0.7, "b2", False),
    ]
    first, joined, *_ = objects
    assert (first.is_occluded, first.is_inside, first.is_truncated) == (True, True, False)  # -1 is unknown
    assert (joined.mask_path, joined.predicted_iou) == ("a1_m01g317_b1.png", 0.9)


def test_repeated_rows_count_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    split = opened(
        tmp_path,
        [box("a1", "/m/0k4j")] * 3,
        [mask("a1", "/m/0k4j", "b1")] * 2,
        ["a1,v,/m/0k4j,1"] * 2,
        ["a1,,,,first,,", "a1,,,,second,,"],
    )
    image = split.describe(["a1"])["a1"]
    [planned] = image.objects
    assert planned.annotation.mask_path
    assert image.verified_present == (2,)
    assert image.metadata.author == "first"
    assert "2 rows repeated among those of the chosen images" in caplog.text
    assert "1 row repeated among those of the chosen images" in caplog.text


def test_unusable_rows_are_left_out_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bad = ["0.5,0.4,0.1,0.2", "nan,0.4,0.1,0.2", ",0.4,0.1,0.2", "1.1,1.4,0.1,0.2", "0.1,1e9,0.1,0.2"]
    bad += ["0.1,inf,0.1,0.2", "10,90,10,90"]
    split = opened(
        tmp_path,
        boxes=[
            *(box("a1", "/m/0k4j", coordinates) for coordinates in bad),
            box("a1", "/m/0k4j", "-0.1,1.4,0.1,0.2"),  # extends beyond the image: the packer clips it
            box("../../etc", "/m/0k4j"),
        ],
        masks=[mask("a1", "/m/01g317", "b1", ",,nan,"), mask("a1", "/m/0k4j", "../../../b2")],
    )
    assert split.candidates() == {1: Candidates(("a1",)), 2: Candidates((), ("a1",))}
    assert "7 rows whose box is empty, inverted or not of numbers: left out" in caplog.text
    assert "1 row with an impossible ImageID: left out" in caplog.text
    assert "1 row with an impossible MaskPath: left out" in caplog.text
    car, person = annotations(split)
    assert car.box == (-0.1, 1.4, 0.1, 0.2)
    assert person.box == (0, 0, 0, 0)  # the packer takes it from the mask


@pytest.mark.parametrize(("written", "read"), [("0.9", 0.9), ("", None), ("-1", None), ("nan", None), ("7e9", None)])
def test_an_estimate_outside_its_range_is_none(tmp_path: Path, written: str, read: float | None) -> None:
    split = opened(tmp_path, masks=[mask("a1", "/m/0k4j", "b1", iou=written)], filters=Filters(min_predicted_iou=0.5))
    [planned] = split.describe(["a1"])["a1"].objects
    assert planned.annotation.predicted_iou == read
    assert planned.has_mask


def test_candidates_distinguish_images_with_masks_from_images_with_boxes(tmp_path: Path) -> None:
    boxes = [box("a1", "/m/01g317"), box("a2", "/m/01g317"), box("a3", "/m/0k4j")]
    split = opened(tmp_path, boxes, [mask("a1", "/m/04yx4", "b1")])
    assert split.candidates() == {1: Candidates(("a1",), ("a2",)), 2: Candidates((), ("a3",))}
    only_masks = replace(split, filters=Filters(require_mask=True))
    only_masks.layout.boxes("validation").delete()  # not read
    assert {category: found.masked for category, found in only_masks.candidates().items()} == {1: ("a1",), 2: ()}


FLAGGED = [
    box("a1", "/m/0k4j", CORNERS, "1,0,0,0,0"),
    box("a1", "/m/0k4j", "0.5,0.9,0.5,0.9", "0,0,0,0,0"),
    box("a2", "/m/0k4j", CORNERS, "1,0,0,0,0"),
    box("a3", "/m/0k4j", CORNERS, "0,0,0,1,1"),
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
def test_dropped_boxes_take_their_masks_and_empty_images_along(
    tmp_path: Path, drop: tuple[str, ...], masked: tuple[str, ...], boxed: tuple[str, ...], left: int
) -> None:
    masks = [mask(image, "/m/0k4j", "b1") for image in ("a1", "a2")]
    masks.append(mask("a4", "/m/0k4j", "b1"))  # without a box, so without flags
    split = opened(tmp_path, FLAGGED, masks, filters=Filters(drop=drop))
    assert split.candidates()[2] == Candidates((*masked, "a4"), boxed)
    assert len(annotations(split)) == left


def test_a_mask_with_a_low_estimate_leaves_its_box(tmp_path: Path) -> None:
    boxes = [box(image, "/m/0k4j") for image in ("a1", "a2")]
    masks = [mask("a1", "/m/0k4j", "b1", iou="0.55"), mask("a2", "/m/0k4j", "b2")]
    split = opened(tmp_path, boxes, masks, filters=Filters(min_predicted_iou=0.6))
    assert split.candidates()[2] == Candidates(("a2",), ("a1",))
    [planned] = split.describe(["a1"])["a1"].objects
    assert planned.mask == Failure("mask-filtered", "predicted IoU 0.55, --min-predicted-iou is 0.6")
    assert (planned.has_mask, planned.annotation.box) == (False, (0.1, 0.2, 0.1, 0.2))


def test_objects_of_other_classes_are_kept_on_request_in_the_order_of_the_table(tmp_path: Path) -> None:
    classes = TAXONOMY.choose(["Car"], others=True)
    assert [category.name for category in classes.categories] == ["Car", "Man", "Person"]
    labels = ("/m/0k4j", "/m/04yx4", "/m/01g317")
    boxes = [box(f"a{n % 7}", labels[n % 3], f"0.{n:04d},0.99,{(n * 37) % 50 / 100},0.99") for n in range(2000)]
    split = opened(tmp_path, [*boxes, box("a9", "/m/04yx4")], classes=classes)
    assert split.candidates() == {1: Candidates((), tuple(f"a{n}" for n in range(7)))}
    objects = annotations(split)
    assert [(o.category_id, o.label, o.box[0]) for o in objects] == [
        (1 + n % 3, labels[n % 3], n / 10_000) for n in range(1, 2000, 7)
    ]
    assert objects == [planned.annotation for planned in split.describe([f"a{n}" for n in range(7)])["a1"].objects]


def test_verified_labels_metadata_and_names_in_any_table(tmp_path: Path) -> None:
    split = opened(
        tmp_path,
        [box("b2", "/m/0jbk")],
        labels=["a1,v,/m/04yx4,1", "a1,v,/m/0k4j,0", "a1,m,/m/0k4j,0.7", "a2,v,/m/0k4j,1"],
        metadata=[
            'a1,http://o,http://l,http://p,"Zoë, ""Z""","two\nlines",270.0',
            *(f"a{n},,,,,,{rotation}" for n, rotation in enumerate(("", "nan", "45", "-90", "1e300"), start=2)),
        ],
    )
    assert split.find(["a5", "b2", "a2", "c3", "../a5", "a5/../a5", ""]) == {"a5": "a5", "b2": "b2", "a2": "a2"}
    assert split.verified(["a1"]) == {"a1": (frozenset(["/m/04yx4"]), frozenset(["/m/0k4j"]))}
    found = split.metadata([f"a{n}" for n in range(1, 7)])
    assert (found["a1"].author, found["a1"].title) == ('Zoë, "Z"', "two\nlines")
    assert [found[f"a{n}"].rotation for n in range(1, 7)] == [270, 0, 0, 0, 270, 0]
