from dataclasses import replace

from hypothesis import given
from hypothesis import strategies as st

from builder.tasks.plan import Annotation, Member, Metadata, PlannedImage, PlannedObject, cut_tasks, make_plan
from shards.format.dataset import Category

CATEGORIES = (Category(1, "Person", "/m/01g317"),)
MEMBER = Member("https://x/train-masks-0.zip", "a.png", 10, 90, 8, 123, 40, 60)
OBJECT = PlannedObject(Annotation(1, "/m/04yx4", (0.1, 0.2, 0.3, 0.4), "a.png", "b1", 0.9), MEMBER)


def image(number: int) -> PlannedImage:
    name = f"{number:016x}"
    return PlannedImage(name, f"s3://images/train/{name}.jpg", (OBJECT,), (1,), (), Metadata(author="Zoë"))


@given(st.integers(0, 40), st.integers(1, 15))
def test_cut_tasks_keeps_the_order_and_fills_all_but_the_last_task(count: int, per_shard: int) -> None:
    images = [image(n) for n in range(count)]
    tasks = cut_tasks("train", images, per_shard)
    assert [i for task in tasks for i in task.images] == images
    assert [task.number for task in tasks] == list(range(len(tasks)))
    assert all(len(task.images) == per_shard for task in tasks[:-1])
    assert all(task.images for task in tasks)
    assert [(task.name, task.path) for task in tasks[:1]] == [("train-000000", "train/000000.tar")] * (count > 0)


def test_the_fingerprint_depends_on_everything_that_decides_bytes() -> None:
    images = [image(n) for n in range(5)]
    tasks = cut_tasks("train", images, 2)
    base = make_plan(CATEGORIES, tasks).fingerprint
    assert base == make_plan(CATEGORIES, cut_tasks("train", [image(n) for n in range(5)], 2)).fingerprint
    other_mask = replace(images[0], objects=(replace(OBJECT, mask=replace(MEMBER, crc32=124)),))
    others = [
        make_plan((Category(1, "Human", "/m/01g317"),), tasks),
        make_plan(CATEGORIES, cut_tasks("train", images, 3)),
        make_plan(CATEGORIES, cut_tasks("val", images, 2)),
        make_plan(CATEGORIES, cut_tasks("train", images[::-1], 2)),
        make_plan(CATEGORIES, cut_tasks("train", [other_mask, *images[1:]], 2)),
        make_plan(CATEGORIES, cut_tasks("train", [replace(images[0], verified_absent=(1,)), *images[1:]], 2)),
    ]
    assert len({base, *(plan.fingerprint for plan in others)}) == 1 + len(others)
