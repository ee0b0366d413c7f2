"""`Instances` and `Batch`."""

import numpy as np
import torch

from shards.format import rle
from shards.format.sample import Instance
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, Batch, padded, padded_count, read_instances


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


def test_padded_rows_are_the_same_for_similar_batches():
    assert [padded_count(count) for count in (0, 1, 8, 9, 16, 17, 100)] == [8, 8, 8, 16, 16, 32, 128]
    columns = padded([read_instances([]), read_instances([Instance(2, (1, 2, 3, 4), None)])])
    assert {name: tuple(column.shape[:2]) for name, column in columns.items()} == dict.fromkeys(columns, (2, 8))
    assert columns["labels"].sum() == columns["labels"][1, 0] == 2
    assert columns["boxes"][1, 0].tolist() == [1, 2, 4, 6]
    # Nothing that is not used can divide by zero.
    assert (columns["boxes"][0, 0].tolist(), columns["frames"][1, 0].tolist()) == ([0, 0, 1, 1], [0, 0, 1, 1])


def test_batch_to_moves_every_tensor():
    batch = Batch(
        images=torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        sizes=torch.tensor([[32, 32]]),
        tiles=torch.tensor([[[0.0, 0, 32, 32]]]),
        verified=torch.ones(1, 1, 3, dtype=torch.bool),
        image_ids=("a",),
        **padded([read_instances([])]),
    )
    moved = batch.to("meta")
    assert len(moved) == 1
    assert {value.device.type for name, value in vars(moved).items() if name != "image_ids"} == {"meta"}
