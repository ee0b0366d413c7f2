import pytest
from hypothesis import given
from hypothesis import strategies as st

from builder.selection import hash_fraction, partition_of, seeded_order, select_images

images = st.sets(st.integers(0, 40).map(lambda n: f"{n:016x}"), max_size=30)
by_class = st.dictionaries(st.integers(1, 5), images, min_size=1)
seeds = st.integers(0, 3)


@given(by_class, st.integers(0, 12), seeds)
def test_every_class_gets_its_quota_or_all_it_has(classes: dict[int, set[str]], quota: int, seed: int) -> None:
    chosen = select_images(classes, quota, seed)
    assert len(chosen) == len(set(chosen))
    assert set(chosen) <= set().union(*classes.values())
    for members in classes.values():
        assert len(members & set(chosen)) >= min(quota, len(members))
    assert len(chosen) <= quota * len(classes)
    assert chosen == seeded_order(chosen, seed)


@given(by_class, st.integers(0, 12), seeds)
def test_no_image_is_chosen_that_no_quota_needs(classes: dict[int, set[str]], quota: int, seed: int) -> None:
    # The rarest class chooses first, so each image was needed by some class when it was taken.
    chosen: set[str] = set()
    for category in sorted(classes, key=lambda c: (len(classes[c]), c)):
        for image in seeded_order(classes[category], seed):
            if len(classes[category] & chosen) >= quota:
                break
            chosen.add(image)
    assert set(select_images(classes, quota, seed)) == chosen


def test_seed_changes_the_choice_and_the_order_of_input_does_not() -> None:
    ids = [f"{n:016x}" for n in range(200)]
    first = select_images({1: ids}, 20, seed=0)
    assert first == select_images({1: ids[::-1]}, 20, seed=0)
    assert first != select_images({1: ids}, 20, seed=1)


@given(st.text(max_size=20), seeds, st.tuples(*[st.floats(0, 1)] * 3).filter(lambda parts: sum(parts) > 1e-6))
def test_partition_depends_on_the_image_alone_and_avoids_empty_parts(
    image: str, seed: int, fractions: tuple[float, float, float]
) -> None:
    part = partition_of(image, fractions, seed)
    assert fractions[part] > 0
    assert part == partition_of(image, fractions, seed)


def test_partition_comes_near_its_fractions_and_is_not_a_stretch_of_the_order() -> None:
    ids = [f"{n:016x}" for n in range(4000)]
    parts = {image: partition_of(image, (0.8, 0.1, 0.1), seed=5) for image in ids}
    shares = [sum(part == p for part in parts.values()) / len(ids) for p in range(3)]
    assert shares == pytest.approx([0.8, 0.1, 0.1], abs=0.02)
    early = [parts[image] for image in seeded_order(ids, seed=5)[:1000]]
    assert early.count(2) / 1000 == pytest.approx(0.1, abs=0.03)


def test_growing_quotas_never_move_an_image_to_another_part() -> None:
    ids = [f"{n:016x}" for n in range(500)]

    def parts(quota: int) -> list[set[str]]:
        members = [[i for i in ids if partition_of(i, (0.8, 0.1, 0.1), 0) == part] for part in range(3)]
        return [set(select_images({1: member}, quota, 0)) for member in members]

    for small, large in zip(parts(10), parts(40)):
        assert small <= large


@given(st.text(max_size=30))
def test_hash_fraction_lies_in_the_unit_interval(text: str) -> None:
    assert 0 <= hash_fraction(text) < 1
