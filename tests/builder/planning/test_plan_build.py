from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.planning.image_list import ImageList
from builder.planning.plan_build import BuildScope, PlannedBuild, plan_build
from builder.planning.selection import Quotas
from builder.sources.base import Candidates, ClassTotals, Filters
from builder.sources.taxonomy import Classes, Taxonomy
from builder.tasks.plan import Annotation, Metadata, PlannedImage, PlannedObject
from shards.common.errors import UserError
from shards.format.shard_tar import seeded_order
from shards.storage.location import Location

NAMES = ("Car", "Dog", "Person")


@dataclass(frozen=True)
class FakeSource:
    """Source split -> image -> class name -> whether it has a mask."""

    tables: Mapping[str, Mapping[str, Mapping[str, bool]]]
    images: Location = Location("memory://fake/images")
    image_layout: str = "<root>/<name>"
    annotations: Location = Location("memory://fake/annotations")

    @property
    def image_roots(self) -> Sequence[Location]:
        return (self.images,)

    @property
    def splits(self) -> Mapping[str, str]:
        return {"train": "train", "val": "validation"}

    def origin(self) -> dict[str, str]:
        return {"name": "fake"}

    def taxonomy(self) -> Taxonomy:
        return Taxonomy({name: name for name in NAMES}, {})

    def open_split(self, split: str, classes: Classes, filters: Filters) -> FakeSplit:
        return FakeSplit(self.tables.get(split, {}), classes)


@dataclass(frozen=True)
class FakeSplit:
    table: Mapping[str, Mapping[str, bool]]
    classes: Classes

    def candidates(self) -> Mapping[int, Candidates]:
        def images(name: str, mask: bool) -> tuple[str, ...]:
            return tuple(sorted(i for i, objects in self.table.items() if objects.get(name) is mask))

        return {c.id: Candidates(images(c.name, True), images(c.name, False)) for c in self.classes.wanted}

    def totals(self) -> Mapping[int, ClassTotals]:
        return {}

    def backgrounds(self) -> Sequence[str]:
        return ()

    def find(self, names: Collection[str]) -> Mapping[str, str]:
        return {name: name for name in names if name in self.table}

    def describe(self, image_ids: Collection[str]) -> Mapping[str, PlannedImage]:
        def planned(name: str, mask: bool) -> PlannedObject:
            annotation = Annotation(self.classes.owners[name], name, (0, 1, 0, 1), "mask" if mask else "")
            return PlannedObject(annotation, None)

        objects = {image_id: tuple(planned(*item) for item in self.table[image_id].items()) for image_id in image_ids}
        return {image_id: PlannedImage(image_id, "", objects[image_id], (), (), Metadata()) for image_id in image_ids}


def split_of(planned: PlannedBuild, split: str = "train") -> list[str]:
    return [image.image_id for task in planned.plan.tasks if task.split == split for image in task.images]


objects = st.dictionaries(st.sampled_from(NAMES), st.booleans(), min_size=1)
tables = st.dictionaries(st.integers(0, 30).map(lambda n: f"i{n}"), objects, min_size=1)


@given(tables, st.integers(1, 8), st.integers(0, 2), st.booleans(), st.sets(st.integers(0, 30)), st.integers(1, 5))
def test_rounds_end_with_quotas_met_or_no_candidates_left(
    table: Mapping[str, Mapping[str, bool]], quota: int, seed: int, masks_only: bool, bad: set[int], per_shard: int
) -> None:
    filters, source = Filters(require_mask=masks_only), FakeSource({"train": table})
    scope = BuildScope(NAMES, Quotas(quota, 0), seed=seed, filters=filters, images_per_shard=per_shard)
    if masks_only and not any(any(found.values()) for found in table.values()):
        with pytest.raises(UserError, match="has a mask of"):
            plan_build(source, scope)
        return
    first, second = (plan_build(source, scope) for _ in range(2))
    assert first.plan == second.plan
    failures = {"train": {f"i{n}" for n in bad}, "val": set[str](), "test": set[str]()}
    tasks = list(first.plan.tasks)
    while fresh := first.next_round(tasks, failures):
        assert fresh == second.next_round(tasks, failures)
        added = [image.image_id for task in fresh for image in task.images]
        assert added == seeded_order(added, seed)
        tasks += fresh
    assert [task.number for task in tasks] == list(range(len(tasks)))
    requested = [image.image_id for task in tasks for image in task.images]
    assert len(requested) == len(set(requested))
    for name in NAMES:
        counted = {i for i, found in table.items() if name in found and (found[name] or not masks_only)}
        for images in (counted, {i for i in counted if table[i][name]}):
            good = images - failures["train"]
            assert len(good & set(requested)) >= min(quota, len(good))


def test_reports_state_the_outcome_and_reason_for_each_class(caplog: pytest.LogCaptureFixture) -> None:
    table = {f"m{n}": {"Car": True} for n in range(3)} | {f"b{n}": {"Car": False, "Dog": False} for n in range(4)}
    planned = plan_build(FakeSource({"train": table}), BuildScope(("Car", "Dog", "Person"), Quotas(5, 0)))
    found = [(r.name, r.asked, r.available, r.masked, r.chosen, r.masks, r.boxes, r.reason) for r in planned.reports]
    assert found == [
        ("Car", 5, 7, 3, 7, 3, 7, "only 3 images with a mask at the source, others have boxes only"),
        ("Dog", 5, 4, 0, 4, 0, 4, "only 4 images at the source"),
        ("Person", 5, 0, 0, 0, 0, 0, "no images at the source"),
    ]
    assert caplog.messages[-2:] == [
        f"{start} (--list-classes counts the masks at the source)"
        for start in (
            "no mask in the selected images of train: Dog",
            "few masks in the selected images of train: Car (3)",
        )
    ]
    masks_only = Filters(require_mask=True)
    [report] = plan_build(FakeSource({"train": table}), BuildScope(("Car",), Quotas(5, 0), filters=masks_only)).reports
    assert (report.available, report.chosen, report.reason) == (3, 3, "only 3 images with a mask at the source")
    [report] = plan_build(FakeSource({"train": table}), BuildScope(("Car",), Quotas(2, 0))).reports
    assert (report.chosen, report.masks, report.reason) == (2, 2, "")


def test_without_a_quota_all_images_that_count_are_selected() -> None:
    table = {"a": {"Car": False}, "b": {"Dog": True}, "c": {"Car": True}}
    planned = plan_build(FakeSource({"train": table, "validation": table}), BuildScope(("Car",), Quotas(None, 1)))
    assert sorted(split_of(planned)) == ["a", "c"]
    assert split_of(planned, "val") == ["c"]
    assert planned.replacements("train", ["a"]) == []
    assert [image.image_id for image in planned.replacements("val", ["c"])] == ["a"]
    assert planned.replacements("test", ["x"]) == []


def test_the_fingerprint_depends_on_the_quota() -> None:
    # Both quotas select the same images, but only the larger one replaces failures.
    table = {"a": {"Car": True}, "b": {"Dog": True}, "c": {"Car": True, "Dog": True}}
    plans = [
        plan_build(FakeSource({"train": table}), BuildScope(("Car", "Dog"), Quotas(quota, 0))).plan for quota in (2, 3)
    ]
    assert plans[0].tasks == plans[1].tasks
    assert plans[0].fingerprint != plans[1].fingerprint


def test_a_list_selects_its_images_and_reports_unknown_ones(tmp_path: Path) -> None:
    source = FakeSource(
        {"train": {"a": {"Car": True}, "b": {"Dog": True}, "c": {}}, "validation": {"d": {"Car": False}}}
    )
    (tmp_path / "ids").write_text("c\ntrain/b\nval/d\nval/a\nnowhere\n")
    planned = plan_build(source, BuildScope(("Car",), ImageList(str(tmp_path / "ids")), all_annotations=True))
    assert sorted(split_of(planned)) == ["b", "c"]
    assert split_of(planned, "val") == ["d"]
    assert [(a.split, a.image_id, a.status, a.detail) for a in planned.unknown] == [
        ("val", "a", "image-unknown", "in no table of validation"),
        ("train", "nowhere", "image-unknown", "in no table of train, validation"),
    ]
    assert planned.replacements("train", ["b"]) == []
    assert [(r.split, r.chosen, r.reason) for r in planned.reports] == [("train", 0, ""), ("val", 1, "")]
    (tmp_path / "ids").write_text("x\n")
    with pytest.raises(UserError, match=r"has none of the listed images \(1\)"):
        plan_build(source, BuildScope(("Car",), ImageList(str(tmp_path / "ids"))))


def test_listed_images_are_in_the_same_part_as_without_a_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    ids = [f"i{n}" for n in range(40)]
    source = FakeSource({"train": {image: {"Car": True} for image in ids}})
    parts = (0.5, 0.3, 0.2)
    by_quota = plan_build(source, BuildScope(("Car",), Quotas(100, 100), partition=parts))
    (tmp_path / "ids").write_text("\n".join([*ids[:25], f"val/{ids[0]}"]))
    listed = plan_build(source, BuildScope(("Car",), ImageList(str(tmp_path / "ids")), partition=parts))
    for split in ("train", "val", "test"):
        assert set(split_of(listed, split)) == set(split_of(by_quota, split)) & set(ids[:25])
    assert "--partition" not in caplog.text
    with caplog.at_level("INFO"):
        doubled = plan_build(source, BuildScope(("Car",), Quotas(100, 100), partition=(1.0, 0.6, 0.4)))
    assert doubled.plan == by_quota.plan
    assert "--partition: the shares are divided by their sum, 2" in caplog.text
    [unknown] = listed.unknown
    assert unknown.detail == "validation is not a split that is read"
