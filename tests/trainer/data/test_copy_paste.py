"""Copy-paste, against full-size masks."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torchvision.models.detection.roi_heads import project_masks_on_boxes
from torchvision.ops import masks_to_boxes

from shards.format import rle
from shards.format.sample import Instance, MaskPrediction
from trainer.data.copy_paste import paste, paste_some
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, LOOSE, PREDICTED, Instances, read_instances
from trainer.data.mask_bitmaps import sample_targets

HEIGHT, WIDTH = 120, 160
IMAGE, DONOR = (torch.full((3, HEIGHT, WIDTH), value, dtype=torch.uint8) for value in (40, 200))


def ellipse(cx: float, cy: float, rx: float, ry: float) -> np.ndarray:
    y, x = np.mgrid[:HEIGHT, :WIDTH]
    return (((x - cx) / rx) ** 2 + ((y - cy) / ry) ** 2 <= 1).astype(np.uint8)


def masked(category: int, mask: np.ndarray) -> Instance:
    encoded = rle.encode(mask)
    return Instance(category, rle.bounds(encoded), encoded)


def objects(*masks: np.ndarray, first: int = 1) -> Instances:
    return read_instances([masked(first + i, mask) for i, mask in enumerate(masks)])


def test_paste_agrees_with_full_size_masks() -> None:
    below = [ellipse(60, 60, 40, 30), ellipse(130, 30, 15, 20), ellipse(30, 100, 20, 12)]
    above = [ellipse(95, 60, 30, 40), ellipse(40, 95, 12, 12)]
    pasted, result = paste(IMAGE, objects(*below), DONOR, objects(*above, first=11))
    assert result.labels.tolist() == [1, 2, 3, 11, 12]
    assert bool((IMAGE == 40).all())

    cover = np.maximum(*above)
    # Edges are soft; each pixel is nearer to the image that it belongs to.
    assert ((pasted[0] > 120) == torch.from_numpy(cover.astype(bool))).float().mean() > 0.999
    assert torch.equal(pasted.unique()[[0, -1]], torch.tensor([40, 200], dtype=torch.uint8))

    masks = torch.from_numpy(np.stack([*(mask & ~cover & 1 for mask in below), *above]))
    boxes = masks_to_boxes(masks) + torch.tensor([0, 0, 1, 1])
    # A cell is at most 82 / 84 of a pixel here, and edges are soft.
    assert (result.boxes - boxes).abs().max() <= 1.5
    expected = project_masks_on_boxes(masks.float(), boxes, torch.arange(5), 28)
    found = sample_targets(result.bitmaps, result.frames, torch.arange(5), boxes, 28)
    assert (found - expected).abs().mean() < 0.01
    assert ((found > 0.5) != (expected > 0.5)).float().mean() < 0.01
    # Only a soft edge covers the second object.
    assert torch.allclose(result.boxes[1], objects(*below).boxes[1], atol=0.1)


def test_paste_drops_covered_objects_and_ignores_those_that_are_mostly_covered() -> None:
    annotations = [
        masked(1, ellipse(60, 60, 20, 20)),  # covered
        masked(2, ellipse(60, 60, 31, 31)),  # covered except for a thin ring
        Instance(3, (40.0, 40.0, 40.0, 40.0), None),  # without a mask, covered
        Instance(4, (100.0, 10.0, 40.0, 40.0), None),  # without a mask, next to the pasted object
        Instance(5, (0.0, 0.0, 150.0, 110.0), None, is_group_of=True),
    ]
    box = read_instances(annotations).boxes[1]
    _, result = paste(IMAGE, read_instances(annotations), DONOR, objects(ellipse(60, 60, 30, 30), first=9))
    assert result.labels.tolist() == [2, 3, 4, 5, 9]
    assert result.flags.tolist() == [HAS_MASK | IGNORED, IGNORED, 0, GROUP_OF, HAS_MASK]
    assert torch.equal(result.boxes[0], box)


@pytest.mark.parametrize(
    ("prediction", "shown", "flags"),
    [
        (None, 0.83, 0),
        (None, 0.77, LOOSE),
        (None, 0.55, LOOSE),
        (None, 0.45, IGNORED),
        (MaskPrediction(0.9, "run"), 0.83, HAS_MASK | PREDICTED),
        (MaskPrediction(0.9, "run"), 0.77, HAS_MASK | PREDICTED | LOOSE),
    ],
)
def test_an_object_without_a_mask_of_the_source_that_is_partly_covered_is_loose(
    prediction: MaskPrediction | None, shown: float, flags: int
) -> None:
    covered = np.zeros((HEIGHT, WIDTH), np.uint8)
    covered[10:110, round(20 + 100 * shown) : 140] = 1
    square = np.zeros((HEIGHT, WIDTH), np.uint8)
    square[10:110, 20:120] = 1
    mask = None if prediction is None else rle.encode(square)
    partly = Instance(1, (20.0, 10.0, 100.0, 100.0), mask, prediction=prediction)
    below = read_instances([partly, masked(2, ellipse(70, 60, 50, 50))])
    _, result = paste(IMAGE, below, DONOR, objects(covered, first=9))
    assert result.labels.tolist() == [1, 2, 9]
    assert result.flags.tolist() == [flags, HAS_MASK, HAS_MASK]
    assert prediction or torch.equal(result.boxes[0], below.boxes[0])


def test_predicted_masks_are_not_pasted() -> None:
    mask = rle.encode(ellipse(50, 50, 20, 20))
    one = Instance(1, rle.bounds(mask), mask)
    donor = read_instances([one, replace(one, category_id=2, prediction=MaskPrediction(0.9, "run"))] * 8)
    _, result = paste_some(IMAGE, read_instances([]), DONOR, donor, 1.0, np.random.default_rng(0))
    assert set(result.labels.tolist()) == {1}


def test_paste_clips_objects_to_the_image() -> None:
    image = torch.zeros((3, 60, 70), dtype=torch.uint8)
    _, result = paste(image, read_instances([]), DONOR, objects(ellipse(60, 50, 30, 30)))
    assert result.boxes.tolist() == [[30, 20, 70, 60]]
    _, unchanged = paste(image, result, DONOR, objects(ellipse(130, 100, 10, 10)))
    assert torch.equal(unchanged.boxes, result.boxes)


def test_the_mask_of_a_pasted_object_ends_where_its_own_image_ends() -> None:
    small, cropped = DONOR[:, :, 30:70], objects(ellipse(50, 60, 40, 40)).crop(30, 0, 40, HEIGHT)
    _, result = paste(IMAGE, read_instances([]), small, cropped)
    whole = torch.tensor([[0.0, 0, WIDTH, HEIGHT]])
    target = sample_targets(result.bitmaps, result.frames, torch.tensor([0]), whole, WIDTH)[0].amax(0)  # [W]
    assert target[:39].min() > 0.9
    assert target[42:].max() < 0.1
    assert result.boxes.tolist() == [[0, 20, 40, 101]]


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_paste_some_pastes_a_random_choice_of_objects_with_masks(probability: float) -> None:
    donors = [masked(1 + i, ellipse(20 + 30 * i, 60, 10, 10)) for i in range(1, 5)]
    donor_instances = read_instances([Instance(1, (10.0, 50.0, 20.0, 20.0), None), *donors])
    found = set()
    for seed in range(20):
        rng = np.random.default_rng(seed)
        _, result = paste_some(IMAGE, read_instances([]), DONOR, donor_instances, probability, rng)
        found.add(tuple(result.labels.tolist()))
    assert (len(found) > 3) == (probability == 1.0)
    assert all(1 not in labels for labels in found)
