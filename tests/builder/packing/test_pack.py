from builder.fetching.traffic import Traffic
from builder.packing.pack import TaskResult, pack_image
from builder.tasks.plan import Annotation, Member, Metadata, PlannedImage, PlannedObject
from shards.format import rle
from shards.format.accounts import BOX_FROM_MASK, Account, remarks
from shards.format.dataset import Shard
from shards.format.index_schema import IndexRow
from shards.format.validation import content_faults
from tests.builder.packing.test_images import blob, png
from tests.support import jpeg


def member(name: str) -> Member:
    return Member("zip", name, 0, 10, 0, 0, 5, 5)


def planned() -> PlannedImage:
    objects = (
        PlannedObject(Annotation(1, "/m/04yx4", (0.1, 0.7, 0.2, 0.9), "good.png", "b1", 0.9), member("good.png")),
        PlannedObject(Annotation(1, "/m/01g317", (0.5, 0.6, 0.5, 0.6), "gone.png", "b2", 0.8), None),
        PlannedObject(Annotation(2, "/m/0k4j", (0.0, 0.5, 0.0, 0.5), is_group_of=True), None),
        PlannedObject(Annotation(2, "/m/0k4j", (0, 0, 0, 0), "boxless.png", "b3"), member("boxless.png")),
    )
    return PlannedImage("a" * 16, "s3://x", objects, (1,), (2,), Metadata(rotation=90, author="Zoë"))


def test_pack_image_keeps_every_object_and_accounts_for_every_mask() -> None:
    data, mask = jpeg(640, 480, 1), png(blob(1600, 1200))
    sample, accounts = pack_image(planned(), data, {member("good.png"): mask, member("boxless.png"): mask}, "train")
    assert sample is not None
    assert sample.image is data
    assert (sample.width, sample.height, sample.rotation, sample.author) == (640, 480, 90, "Zoë")
    assert [i.segmentation is not None for i in sample.instances] == [True, False, False, True]
    assert [i.is_group_of for i in sample.instances] == [False, False, True, False]
    assert sample.instances[0].bbox == (64.0, 96.0, 384.0, 336.0)
    assert sample.instances[0].label == "/m/04yx4"
    assert sample.instances[3].segmentation is not None
    assert sample.instances[3].bbox == rle.bounds(sample.instances[3].segmentation)
    assert [(a.kind, a.source, a.status) for a in accounts] == [
        ("image", "a" * 16 + ".jpg", "packed"),
        ("mask", "good.png", "packed"),
        ("mask", "gone.png", "mask-missing"),
        ("mask", "boxless.png", "packed"),
    ]


def test_records_are_read_back_unless_damaged_or_of_another_task() -> None:
    row = IndexRow("a", "val", "val/000000.tar", 0, 2048, 7, 4, 3, (1,), (2,), (1,), (0,))
    shard = Shard("val/000000.tar", "val", 1, 10240, "00")
    result = TaskResult(shard, (row,), (Account("image", "val", "a", "", "a.jpg", "packed"),), images=Traffic(1, 99))
    record = result.to_record("f1")
    back = TaskResult.from_record(record, "f1")
    assert back is not None
    assert (back.shard, back.rows, back.accounts) == (result.shard, result.rows, result.accounts)
    for data, fingerprint in ((record, "f2"), (record[:-5], "f1"), (b"[]", "f1"), (b'{"task":"f1"}', "f1")):
        assert TaskResult.from_record(data, fingerprint) is None


def test_a_box_that_does_not_contain_its_mask_is_taken_from_the_mask() -> None:
    mask = png(blob(1600, 1200))  # from 17 to 63 % of the width
    boxes = ((0.0, 0.05, 0.0, 0.05), (0.0, 0.4, 0.0, 1.0), (0.1, 0.7, 0.3, 0.9))
    names = [f"{number}.png" for number in range(3)]
    objects = [
        PlannedObject(Annotation(1, "x", box, name), member(name)) for box, name in zip(boxes, names, strict=True)
    ]
    image = PlannedImage("a", "s3://x", tuple(objects), (), (), Metadata())
    sample, accounts = pack_image(image, jpeg(640, 480, 1), dict.fromkeys(map(member, names), mask), "train")
    assert sample is not None
    lost, half, good = sample.instances
    assert lost.segmentation is not None
    assert lost.bbox == rle.bounds(lost.segmentation)
    assert (half.bbox, good.bbox) == ((0, 0, 256, 480), (64, 144, 384, 288))
    assert [account.detail for account in accounts] == ["", BOX_FROM_MASK, "", ""]
    assert remarks(accounts) == {BOX_FROM_MASK: 1}
    assert not list(content_faults(sample, None, {1}))
