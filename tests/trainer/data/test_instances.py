"""Bitmaps in frames, against pycocotools, brute force, and torchvision's full-size masks."""

from __future__ import annotations

import io
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from shards.format import rle
from shards.format.rle import Rle
from shards.format.sample import Instance
from tests.support import REPOSITORY
from trainer.data import instances as geometry
from trainer.data.instances import (
    BITMAP,
    GROUP_OF,
    HAS_MASK,
    IGNORED,
    Batch,
    Instances,
    cap,
    crop,
    flip,
    rasterise,
    read_instances,
    sample_targets,
    scale,
)

REAL_MASKS = REPOSITORY / "../shared/openimages-sample/openimages/v5/train-masks"
TARGET = 28


def ellipse(draw, x, y, w, h, rng):
    draw.ellipse((x, y, x + w, y + h), fill=1)


def polygon(draw, x, y, w, h, rng):
    draw.polygon([(x + rng.uniform(0, w), y + rng.uniform(0, h)) for _ in range(7)], fill=1)


def thin(draw, x, y, w, h, rng):
    draw.line((x, y, x + w, y + h), fill=1, width=max(1, round(min(w, h) / 6)))


def ring(draw, x, y, w, h, rng):
    draw.ellipse((x, y, x + w, y + h), fill=1)
    draw.ellipse((x + w / 4, y + h / 4, x + 3 * w / 4, y + 3 * h / 4), fill=0)


SHAPES = (ellipse, polygon, thin, ring)


def procedural_masks(size: int, count: int, shapes=SHAPES) -> list[np.ndarray]:
    """Masks of about `size` pixels in images of 1024 x 768, some of them cut off by the image's border."""
    rng = np.random.default_rng(size)
    masks = []
    while len(masks) < count:
        w, h = size * rng.uniform(0.6, 1), size * rng.uniform(0.6, 1)
        x, y = rng.uniform(-w / 4, 1024 - 0.75 * w), rng.uniform(-h / 4, 768 - 0.75 * h)
        canvas = Image.new("L", (1024, 768))
        shapes[len(masks) % len(shapes)](ImageDraw.Draw(canvas), x, y, w, h, rng)
        mask = np.asarray(canvas)
        if mask.any():
            masks.append(mask)
    return masks


def jittered_rois(box: tuple[float, ...], width: int, height: int, count: int, rng) -> torch.Tensor:
    """RoIs such as the box head gives: the object's box, and boxes around it that overlap it well."""
    x, y, w, h = box
    rois = np.array([x, y, x + w, y + h]) + rng.uniform(-0.12, 0.12, (count, 4)) * [w, h, w, h]
    rois[0] = [x, y, x + w, y + h]
    return torch.tensor(rois.clip(0, [width, height, width, height]), dtype=torch.float32)


def full_size_targets(mask: np.ndarray, rois: torch.Tensor) -> torch.Tensor:
    zeros = torch.zeros(len(rois), dtype=torch.int64)
    return project_masks_on_boxes(torch.from_numpy(mask.copy())[None], rois, zeros, TARGET)


def bitmap_targets(mask: np.ndarray, rois: torch.Tensor) -> torch.Tensor:
    bitmap, frame = rasterise(rle.encode(mask))
    zeros = torch.zeros(len(rois), dtype=torch.int64)
    return sample_targets(bitmap[None], torch.tensor([frame]), zeros, rois, TARGET)


def agreement(ours: torch.Tensor, theirs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean absolute difference, and IoU at 0.5, of each target."""
    a, b = ours >= 0.5, theirs >= 0.5
    union = (a | b).sum((1, 2))
    iou = torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp(min=1), 1.0)
    return (ours - theirs).abs().mean((1, 2)), iou


def assert_targets_agree(masks: list[np.ndarray], rois_each: int = 6) -> None:
    rng = np.random.default_rng(0)
    differences, ious = [], []
    for mask in masks:
        rois = jittered_rois(rle.bounds(rle.encode(mask)), mask.shape[1], mask.shape[0], rois_each, rng)
        difference, iou = agreement(bitmap_targets(mask, rois), full_size_targets(mask, rois))
        differences.append(difference)
        ious.append(iou)
    assert torch.cat(differences).mean() < 0.01
    assert torch.cat(ious).mean() > 0.98


@pytest.mark.parametrize("size", [8, 16, 32, 64, 150, 400, 900])
def test_targets_agree_with_torchvision_on_procedural_masks(size):
    assert_targets_agree(procedural_masks(size, count=24 if size < 400 else 12))


def test_targets_agree_with_torchvision_on_real_masks():
    archives = sorted(REAL_MASKS.glob("*.zip"))
    if not archives:
        pytest.skip(f"the sample of Open Images is not at {REAL_MASKS}")
    masks = []
    for archive in archives:
        with zipfile.ZipFile(archive) as file:
            for name in file.namelist():
                try:
                    picture = Image.open(io.BytesIO(file.read(name))).convert("1")
                except OSError:
                    continue  # the sample holds broken files on purpose
                picture.thumbnail((1024, 1024), Image.Resampling.NEAREST)  # masks come larger than their images
                mask = np.asarray(picture).astype(np.uint8)
                if mask.any():
                    masks.append(mask)
    assert len(masks) > 100
    assert_targets_agree(masks[::2], rois_each=4)
    tiny = [mask[::12, ::12] for mask in masks[::2] if mask[::12, ::12].sum() >= 16]
    assert_targets_agree(tiny, rois_each=4)


@pytest.mark.parametrize("side", [12, 84])
def test_a_cell_is_the_mean_of_the_linearly_read_mask(side):
    """Against brute force: 24 x 24 points a cell, each read between the four nearest pixels."""
    rng = np.random.default_rng(1)
    mask = np.zeros((40, 50), np.uint8)
    mask[7:30, 5:41] = rng.random((23, 36)) < 0.6
    bitmap, frame = rasterise(rle.encode(mask), side)
    points = [
        torch.tensor(
            np.linspace(frame[k], frame[k + 2], 24 * side, endpoint=False) + (frame[k + 2] - frame[k]) / side / 48
        )
        for k in (0, 1)
    ]
    normalised = torch.meshgrid(points[1] / 40 * 2 - 1, points[0] / 50 * 2 - 1, indexing="ij")
    grid = torch.stack((normalised[1], normalised[0]), dim=-1)[None]
    values = torch.nn.functional.grid_sample(
        torch.from_numpy(mask)[None, None].double(), grid, mode="bilinear", padding_mode="border", align_corners=False
    )
    expected = torch.nn.functional.avg_pool2d(values, 24)[0, 0] * 255
    assert (bitmap.double() - expected).abs().max() <= 1


def test_a_bitmap_keeps_the_area_and_has_an_empty_border():
    for mask in (m for size in (9, 60, 300) for m in procedural_masks(size, 8)):
        padded = np.pad(mask, 2)  # so that nothing touches the image's border
        bitmap, (x0, y0, x1, y1) = rasterise(rle.encode(padded))
        covered = bitmap.double().sum() / 255 * (x1 - x0) * (y1 - y0) / BITMAP**2
        assert float(covered) == pytest.approx(padded.sum(), rel=0.01)
        assert int(bitmap[[0, -1]].sum() + bitmap[:, [0, -1]].sum()) == 0


def test_column_runs_are_the_mask():
    rng = np.random.default_rng(2)
    for _ in range(60):
        height, width = rng.integers(1, 70, 2)
        mask = (rng.random((height, width)) < rng.choice([0.02, 0.5, 0.98])).astype(np.uint8)
        mask[rng.integers(height), rng.integers(width)] = 1
        if rng.random() < 0.3:
            mask = np.repeat(np.repeat(mask, 40, axis=0), 30, axis=1)  # long runs: numbers of several characters
        encoded = rle.encode(mask)
        painted = np.zeros_like(mask)
        for column, top, bottom in zip(*geometry._column_runs(encoded), strict=True):
            painted[top:bottom, column] += 1
        assert np.array_equal(painted, mask)


def test_a_mask_without_a_pixel_is_no_mask():
    assert rasterise(rle.encode(np.zeros((30, 20), np.uint8))) is None


def objects(*masks: np.ndarray) -> Instances:
    encoded = [rle.encode(mask) for mask in masks]
    return read_instances([Instance(1, rle.bounds(mask), mask) for mask in encoded])


def targets_of(instances: Instances, rois: torch.Tensor) -> torch.Tensor:
    return sample_targets(instances.bitmaps, instances.frames, torch.zeros(len(rois), dtype=torch.int64), rois, TARGET)


def test_a_flip_equals_reading_the_flipped_mask():
    for mask in procedural_masks(120, 8):
        flipped, expected = flip(objects(mask), mask.shape[1]), objects(np.ascontiguousarray(mask[:, ::-1]))
        assert torch.equal(flipped.boxes, expected.boxes)
        assert torch.allclose(flipped.frames, expected.frames, atol=1e-3)
        assert (flipped.bitmaps.int() - expected.bitmaps.int()).abs().max() <= 1


@pytest.mark.parametrize("factors", [(0.75, 0.7), (1.6, 1.55)])
def test_scaled_frames_agree_with_resized_masks(factors):
    rng = np.random.default_rng(3)
    differences, ious = [], []
    # No thin shapes: a line of two pixels, resized to a binary mask again, is another line.
    for mask in procedural_masks(150, 12, shapes=(ellipse, polygon, ring)):
        width, height = round(mask.shape[1] * factors[0]), round(mask.shape[0] * factors[1])
        resized = np.array(Image.fromarray(mask * 255).resize((width, height), Image.Resampling.BILINEAR)) >= 128
        scaled = scale(objects(mask), width / mask.shape[1], height / mask.shape[0])
        rois = jittered_rois(rle.bounds(rle.encode(resized)), width, height, 6, rng)
        difference, iou = agreement(targets_of(scaled, rois), full_size_targets(resized.astype(np.uint8), rois))
        differences.append(difference)
        ious.append(iou)
    assert torch.cat(differences).mean() < 0.01
    assert torch.cat(ious).mean() > 0.98


def test_a_crop_agrees_with_the_cropped_mask():
    rng = np.random.default_rng(4)
    differences = []
    for mask in procedural_masks(300, 8):
        x, y, w, h = (int(v) for v in rle.bounds(rle.encode(mask)))
        window = (x + w // 4, y + h // 4, w, h)  # a quarter of the object is cut off at the left and at the top
        cut = np.ascontiguousarray(mask[window[1] :, window[0] :][: window[3], : window[2]])
        cropped = crop(objects(mask), *window)
        assert torch.equal(cropped.boxes, torch.tensor([[0.0, 0.0, w - w // 4, h - h // 4]]))
        rois = jittered_rois(rle.bounds(rle.encode(cut)), cut.shape[1], cut.shape[0], 6, rng)
        differences.append(agreement(targets_of(cropped, rois), full_size_targets(cut, rois))[0])
    assert torch.cat(differences).mean() < 0.01


def test_crop_drops_what_is_narrower_than_a_pixel():
    boxes = [(10, 10, 20, 20), (0, 0, 10.5, 30), (29.2, 5, 30, 30), (-5, 3, 8, 8)]
    instances = read_instances([Instance(i + 1, box, None) for i, box in enumerate(boxes)])
    cropped = crop(instances, 10, 0, 20, 40)
    assert cropped.labels.tolist() == [1]
    assert cropped.boxes.tolist() == [[0, 10, 20, 30]]
    assert len(crop(read_instances([]), 0, 0, 5, 5)) == 0


def test_flags_tell_masks_and_groups():
    mask = np.zeros((20, 30), np.uint8)
    empty = rle.encode(mask)
    mask[4:9, 3:12] = 1
    instances = read_instances(
        [
            Instance(1, (3, 4, 9, 5), rle.encode(mask)),
            Instance(2, (0, 0, 5, 5), None),
            Instance(3, (0, 0, 5, 5), None, is_group_of=True),
            Instance(4, (0, 0, 5, 5), empty),
        ]
    )
    assert instances.flags.tolist() == [HAS_MASK, 0, GROUP_OF, 0]
    assert instances.labels.tolist() == [1, 2, 3, 4]
    assert instances.boxes[0].tolist() == [3, 4, 12, 9]
    assert instances.bitmaps[1:].sum() == 0
    assert instances.frames[1:].abs().sum() == 0
    assert [item.dtype for item in (instances.boxes, instances.bitmaps, instances.frames)] == [
        torch.float32,
        torch.uint8,
        torch.float32,
    ]


def test_a_one_pixel_mask_and_a_full_image_mask_are_legal():
    for mask in (np.eye(1, dtype=np.uint8), np.ones((600, 800), np.uint8)):
        bitmap, frame = rasterise(rle.encode(mask))
        assert bitmap[1:-1, 1:-1].min() == 255  # the border of the image is repeated beyond it
        assert frame[0] < 0
        assert frame[2] > mask.shape[1]
    assert rasterise(Rle(5, 5, rle.encode(np.eye(5, dtype=np.uint8)).counts))[0].max() > 0


def test_a_batch_moves_but_for_what_the_host_reads():
    batch = Batch(
        images=torch.zeros(1, 3, 32, 32, dtype=torch.uint8),
        sizes=torch.tensor([[32, 32]]),
        counts=torch.tensor([0]),
        image_ids=("a",),
        verified=(None,),
        **vars(read_instances([])),
    )
    moved = batch.to("meta")
    assert len(moved) == 1
    assert moved.images.device.type == moved.bitmaps.device.type == "meta"
    assert {host.device.type for host in (moved.sizes, moved.counts, moved.flags)} == {"cpu"}
    assert moved.verified == (None,)


def test_the_cap_leaves_a_random_choice_of_the_objects():
    boxes = [Instance(i + 1, (5.0 * i, 0, 4, 4), None, is_group_of=i in (2, 5)) for i in range(12)]
    instances = read_instances(boxes)
    taught = []
    for seed in range(200):
        capped = cap(instances, 3, np.random.default_rng(seed))
        assert torch.equal((capped.flags & GROUP_OF) != 0, (instances.flags & GROUP_OF) != 0)
        assert (capped.flags[[2, 5]] & IGNORED == 0).all()
        taught.append(capped.labels[capped.flags == 0].tolist())
        assert torch.equal(capped.boxes, instances.boxes)
    assert {len(labels) for labels in taught} == {3}
    # Each of the ten objects is among three in about 60 of 200 draws: 30 is more than four deviations away.
    often = np.bincount(np.concatenate(taught), minlength=13)
    assert often[[3, 6]].tolist() == [0, 0]
    assert all(30 < often[label] < 90 for label in range(1, 13) if label not in (3, 6))
    assert (instances.flags & IGNORED).sum() == 0
    again = cap(instances, 3, np.random.default_rng(0))
    assert again.labels[again.flags == 0].tolist() == taught[0]
    assert cap(instances, 10, np.random.default_rng(0)) is instances
