from dataclasses import replace

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from shards.format import rle
from shards.format.rle import Rle
from shards.format.sample import Instance
from shards.format.validation import content_faults, instance_faults
from tests.support import sample


@given(st.text(max_size=30), st.integers(1, 40), st.integers(1, 40))
def test_any_text_as_rle_is_a_fault_or_a_mask(counts: str, height: int, width: int) -> None:
    instance = Instance(1, (0.0, 0.0, 1.0, 1.0), Rle(height, width, counts))
    if not list(instance_faults(instance, width, height, {1})):
        assert rle.decode(Rle(height, width, counts)).sum() == rle.area(Rle(height, width, counts)) > 0


def test_a_truncated_picture_of_another_size_has_two_faults() -> None:
    one = replace(sample(0), width=40, instances=())
    faults = list(content_faults(replace(one, image=one.image[:-200]), None, {1, 2}))
    assert [fault.split(" ", 1)[1][:17] for fault in faults] == ["is 48x32, 0000000", "cannot be decoded"]


def test_the_mask_of_a_tiny_box_may_extend_beyond_it_by_a_pixel() -> None:
    mask = np.zeros((20, 20), np.uint8)
    mask[5, 10] = 1
    for x, fault in ((10.6, False), (11.4, False), (13.0, True)):
        instance = Instance(1, (x, 5.0, 0.3, 0.4), rle.encode(mask))
        assert bool(list(instance_faults(instance, 20, 20, {1}))) == fault
