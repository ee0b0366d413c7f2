import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.planning.selection import Partition, select_images
from builder.sources.base import Candidates
from shards.format.dataset import SPLITS
from shards.format.shard_tar import seeded_order

Classes = dict[int, Candidates]


@st.composite
def candidates(draw: st.DrawFn) -> Candidates:
    ids = draw(st.lists(st.integers(0, 40).map(lambda n: f"{n:016x}"), max_size=30, unique=True))
    cut = draw(st.integers(0, len(ids)))
    return Candidates(tuple(ids[:cut]), tuple(ids[cut:]))


by_class = st.dictionaries(st.integers(1, 5), candidates(), min_size=1)
quotas = st.integers(0, 12)
seeds = st.integers(0, 3)
all_fractions = st.tuples(*[st.floats(0, 1)] * 3).filter(lambda parts: sum(parts) > 1e-6)


def members(found: Candidates) -> set[str]:
    return {*found.masked, *found.boxed}


@given(by_class, quotas, seeds)
def test_every_class_gets_its_quota_with_masks_first_and_no_image_more(classes: Classes, quota: int, seed: int) -> None:
    chosen = select_images(classes, quota, seed)
    assert chosen == seeded_order(set(chosen), seed)
    for found in classes.values():
        assert len(members(found) & set(chosen)) >= min(quota, len(found))
        assert len(set(found.masked) & set(chosen)) >= min(quota, len(found.masked))
    # One image at a time, rarest class first: each image was needed by some class when it was taken.
    expected: set[str] = set()
    for kind in ("masked", "boxed"):
        for category in sorted(classes, key=lambda c: (len(getattr(classes[c], kind)), c)):
            found = classes[category]
            counted = set(found.masked) if kind == "masked" else members(found)
            for image in seeded_order(getattr(found, kind), seed):
                if len(counted & expected) >= quota:
                    break
                expected.add(image)
    assert set(chosen) == expected
    everything = set().union(*map(members, classes.values()))
    assert select_images(classes, None, seed) == seeded_order(everything, seed)


@given(st.text(max_size=20), seeds, all_fractions)
def test_split_of_never_returns_an_empty_part(image: str, seed: int, fractions: tuple[float, float, float]) -> None:
    assert fractions[SPLITS.index(Partition(fractions, seed).split_of(image))] > 0


def test_parts_have_their_fractions_and_are_independent_of_the_order() -> None:
    ids = [f"{n:016x}" for n in range(4000)]
    parts = {image: Partition((0.8, 0.1, 0.1), seed=5).split_of(image) for image in ids}
    shares = [sum(part == split for part in parts.values()) / len(ids) for split in SPLITS]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    early = [parts[image] for image in seeded_order(ids, seed=5)[:1000]]
    assert early.count("test") / 1000 == pytest.approx(0.1, abs=0.03)


@given(st.sets(st.integers(0, 500), max_size=60), all_fractions, seeds, st.integers(0, 10), st.integers(0, 30))
def test_larger_quotas_and_sources_never_move_an_image_to_another_part(
    numbers: set[int], fractions: tuple[float, float, float], seed: int, quota: int, more: int
) -> None:
    def parts(ids: list[str], quota: int) -> list[set[str]]:
        partition = Partition(fractions, seed)
        mine = [tuple(i for i in ids if partition.split_of(i) == split) for split in SPLITS]
        return [set(select_images({1: Candidates(images)}, quota, seed)) for images in mine]

    ids = [f"{n:016x}" for n in sorted(numbers)]
    small, large = parts(ids, quota), parts(ids, quota + more)
    grown = parts(sorted({*ids, *(f"{n:016x}" for n in range(500, 540))}), quota + more)
    for part in range(3):
        assert small[part] <= large[part]
        assert not any(large[part] & grown[other] for other in range(3) if other != part)
