import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import masks_to_boxes

from shards.format import rle
from shards.format.sample import Instance
from trainer.data.copy_paste import paste, paste_some
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, Instances, read_instances, sample_targets

HEIGHT, WIDTH = 120, 160


def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1).astype(np.uint8)


def box_of(mask: np.ndarray) -> tuple[float, float, float, float]:
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return (
        float(columns[0]),
        float(rows[0]),
        float(columns[-1] - columns[0] + 1),
        float(rows[-1] - rows[0] + 1),
    )


def objects(*masks: np.ndarray, first: int = 1) -> Instances:
    return read_instances([Instance(first + i, box_of(mask), rle.encode(mask)) for i, mask in enumerate(masks)])


def images() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.full((3, HEIGHT, WIDTH), 40, dtype=torch.uint8), torch.full((3, HEIGHT, WIDTH), 200, dtype=torch.uint8)


def test_masks_boxes_and_pixels_are_those_of_full_size_masks() -> None:
    below = [ellipse(60, 60, 40, 30), ellipse(130, 30, 15, 20), ellipse(30, 100, 20, 12)]
    above = [ellipse(95, 60, 30, 40), ellipse(40, 95, 12, 12)]
    image, donor = images()
    pasted, left = paste(image, objects(*below), donor, objects(*above, first=11))
    assert left.labels.tolist() == [1, 2, 3, 11, 12]
    assert bool((image == 40).all())

    cover = np.maximum(*above)
    # Edges are soft; each pixel is nearer to the image that it belongs to.
    assert ((pasted[0] > 120) == torch.from_numpy(cover.astype(bool))).float().mean() > 0.999
    assert torch.equal(pasted.unique()[[0, -1]], torch.tensor([40, 200], dtype=torch.uint8))

    masks = torch.from_numpy(np.stack([*(mask & ~cover & 1 for mask in below), *above]))
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    # A cell is at most 82 / 84 of a pixel here, and rims are soft.
    assert (left.boxes - boxes).abs().max() <= 1.5
    wanted = project_masks_on_boxes(masks.float(), boxes, torch.arange(5), 28)
    ours = sample_targets(left.bitmaps, left.frames, torch.arange(5), boxes, 28)
    assert (ours - wanted).abs().mean() < 0.01
    assert ((ours > 0.5) != (wanted > 0.5)).float().mean() < 0.01
    # Nothing but a soft edge fell on this one: its box is as it was.
    assert torch.equal(left.boxes[1], objects(*below).boxes[1])


def test_what_is_hidden_is_no_object_and_no_background() -> None:
    annotations = [
        Instance(1, box_of(ellipse(60, 60, 20, 20)), rle.encode(ellipse(60, 60, 20, 20))),  # wholly hidden
        Instance(2, (30.0, 30.0, 62.0, 60.0), rle.encode(ellipse(60, 60, 31, 31))),  # a thin ring is left
        Instance(3, (40.0, 40.0, 40.0, 40.0), None),  # no mask, under the paste
        Instance(4, (100.0, 10.0, 40.0, 40.0), None),  # no mask, beside it
        Instance(5, (0.0, 0.0, 150.0, 110.0), None, is_group_of=True),
    ]
    image, donor = images()
    _, left = paste(image, read_instances(annotations), donor, objects(ellipse(60, 60, 30, 30), first=9))
    assert left.labels.tolist() == [2, 3, 4, 5, 9]
    assert left.flags.tolist() == [HAS_MASK | IGNORED, IGNORED, 0, GROUP_OF, HAS_MASK]
    assert left.boxes[0].tolist() == [30, 30, 92, 90]


def test_objects_are_cut_where_the_other_image_ends() -> None:
    image, donor = torch.zeros((3, 60, 70), dtype=torch.uint8), images()[1]
    _, left = paste(image, objects().select(torch.zeros(0, dtype=torch.int64)), donor, objects(ellipse(60, 50, 30, 30)))
    assert left.boxes.tolist() == [[30, 20, 70, 60]]
    gone = paste(image, left, donor, objects(ellipse(130, 100, 10, 10)))[1]
    assert torch.equal(gone.boxes, left.boxes)


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_chance_decides_whether_and_which(probability: float) -> None:
    image, donor = images()
    masks = [ellipse(20 + 30 * i, 60, 10, 10) for i in range(5)]
    taken = read_instances(
        [Instance(1 + i, box_of(mask), rle.encode(mask) if i else None) for i, mask in enumerate(masks)]
    )
    none = objects().select(torch.zeros(0, dtype=torch.int64))
    found = [
        tuple(paste_some(image, none, donor, taken, probability, np.random.default_rng(seed))[1].labels.tolist())
        for seed in range(20)
    ]
    assert (len(set(found)) > 3) == (probability == 1.0)
    assert all(1 not in labels for labels in found)  # it has no mask
