"""`Instances` and `Batch`."""

import numpy as np

from shards.format import rle
from shards.format.sample import Instance
from tests.trainer.batches import SCENES, batch_of
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, read_instances


def test_read_instances_flags_masks_and_groups():
    mask = np.zeros((20, 30), np.uint8)
    empty = rle.encode(mask)
    mask[4:9, 3:12] = 1
    box = (0, 0, 5, 5)
    plain, group = Instance(2, box, None), Instance(3, box, None, is_group_of=True)
    instances = read_instances([Instance(1, (3, 4, 9, 5), rle.encode(mask)), plain, group, Instance(4, box, empty)])
    assert instances.flags.tolist() == [HAS_MASK, 0, GROUP_OF, 0]
    assert instances.labels.tolist() == [1, 2, 3, 4]
    assert instances.boxes[0].tolist() == [3, 4, 12, 9]
    assert instances.bitmaps[1:].sum() == 0
    assert instances.frames[1:].abs().sum() == 0


def test_cap_ignores_all_but_a_random_choice_of_objects():
    annotations = [Instance(i + 1, (5.0 * i, 0, 4, 4), None, is_group_of=i in (2, 5)) for i in range(12)]
    instances = read_instances(annotations)
    kept = []
    for seed in range(200):
        capped = instances.cap(3, np.random.default_rng(seed))
        assert capped.flags[[2, 5]].tolist() == [GROUP_OF, GROUP_OF]
        assert set(capped.flags.tolist()) == {0, GROUP_OF, IGNORED}
        kept.append(capped.labels[capped.flags == 0].tolist())
    assert {len(labels) for labels in kept} == {3}
    # Each of the ten objects is among three in about 60 of 200 draws: 30 is more than four deviations away.
    counts = np.bincount(np.concatenate(kept), minlength=13)
    assert all(30 < counts[label] < 90 for label in range(1, 13) if label not in (3, 6))
    assert (instances.flags & IGNORED).sum() == 0
    assert instances.cap(10, np.random.default_rng(0)) is instances


def test_batch_to_leaves_on_the_host_what_python_reads():
    moved = batch_of(SCENES[:1]).to("meta")
    assert len(moved) == 1
    assert moved.images.device.type == moved.bitmaps.device.type == "meta"
    assert {host.device.type for host in (moved.sizes, moved.counts, moved.flags)} == {"cpu"}
    assert moved.verified == (None,)
