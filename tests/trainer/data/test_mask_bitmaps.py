"""`rasterise` and `sample_targets`, and `Instances` geometry, against full-size masks in torchvision."""

import contextlib
import io
import zipfile
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from torchvision.models.detection.roi_heads import project_masks_on_boxes

from shards.format import rle
from shards.format.sample import Instance
from tests.support import REPOSITORY
from trainer.data.instances import Instances, read_instances
from trainer.data.mask_bitmaps import BITMAP, rasterise, sample_targets

REAL_MASKS = REPOSITORY / "../shared/openimages-sample/openimages/v5/train-masks"
TARGET = 28
SHAPES = ("ellipse", "polygon", "thin", "ring")


def procedural_masks(size: int, count: int, shapes: Sequence[str] = SHAPES) -> list[np.ndarray]:
    """Masks of about `size` pixels in images of 1024 x 768, some of them cut off by the image's border."""
    rng = np.random.default_rng(size)
    masks: list[np.ndarray] = []
    while len(masks) < count:
        w, h = size * rng.uniform(0.6, 1), size * rng.uniform(0.6, 1)
        x, y = rng.uniform(-w / 4, 1024 - 0.75 * w), rng.uniform(-h / 4, 768 - 0.75 * h)
        canvas, shape = Image.new("L", (1024, 768)), shapes[len(masks) % len(shapes)]
        draw = ImageDraw.Draw(canvas)
        if shape == "polygon":
            draw.polygon([(x + rng.uniform(0, w), y + rng.uniform(0, h)) for _ in range(7)], fill=1)
        elif shape == "thin":
            draw.line((x, y, x + w, y + h), fill=1, width=max(1, round(min(w, h) / 6)))
        else:
            draw.ellipse((x, y, x + w, y + h), fill=1)
        if shape == "ring":
            draw.ellipse((x + w / 4, y + h / 4, x + 3 * w / 4, y + 3 * h / 4), fill=0)
        mask = np.asarray(canvas)
        if mask.any():
            masks.append(mask)
    return masks


def instance_of(mask: np.ndarray) -> Instances:
    encoded = rle.encode(np.ascontiguousarray(mask))
    return read_instances([Instance(1, rle.bounds(encoded), encoded)])


def bitmap_of(mask: np.ndarray, side: int = BITMAP) -> tuple[torch.Tensor, tuple[float, float, float, float]]:
    found = rasterise(rle.encode(mask), side)
    assert found is not None
    return found


def target_errors(pairs: Sequence[tuple[Instances, np.ndarray]], rois_each: int = 6) -> tuple[float, float]:
    """Compare the targets of instances with those of full-size masks: mean absolute difference, and IoU at 0.5.

    The RoIs are such as the box head gives: the object's box, and boxes around it that overlap it well.
    """
    rng = np.random.default_rng(0)
    differences, ious = [], []
    for instances, mask in pairs:
        height, width = mask.shape
        x, y, w, h = rle.bounds(rle.encode(np.ascontiguousarray(mask)))
        places = np.array([x, y, x + w, y + h]) + rng.uniform(-0.12, 0.12, (rois_each, 4)) * [w, h, w, h]
        places[0] = [x, y, x + w, y + h]
        rois = torch.tensor(places.clip(0, [width, height, width, height]), dtype=torch.float32)
        zeros = torch.zeros(rois_each, dtype=torch.int64)
        found = sample_targets(instances.bitmaps, instances.frames, zeros, rois, TARGET)
        expected = project_masks_on_boxes(torch.from_numpy(mask.astype(np.uint8))[None], rois, zeros, TARGET)
        a, b = found >= 0.5, expected >= 0.5
        union = (a | b).sum((1, 2))
        differences.append((found - expected).abs().mean((1, 2)))
        ious.append(torch.where(union > 0, (a & b).sum((1, 2)) / union.clamp(min=1), 1.0))
    return float(torch.cat(differences).mean()), float(torch.cat(ious).mean())


def assert_targets_agree(pairs: Sequence[tuple[Instances, np.ndarray]]) -> None:
    difference, iou = target_errors(pairs)
    assert difference < 0.01
    assert iou > 0.98


@pytest.mark.parametrize("size", [8, 16, 32, 64, 150, 400, 900])
def test_targets_agree_with_torchvision_on_procedural_masks(size):
    assert_targets_agree([(instance_of(mask), mask) for mask in procedural_masks(size, count=12)])


@pytest.mark.skipif(not REAL_MASKS.is_dir(), reason=f"{REAL_MASKS} does not exist")
def test_targets_agree_with_torchvision_on_real_masks():
    masks = []
    for archive in map(zipfile.ZipFile, sorted(REAL_MASKS.glob("*.zip"))):
        for name in archive.namelist()[::2]:
            with contextlib.suppress(OSError):  # the sample contains broken files on purpose
                picture = Image.open(io.BytesIO(archive.read(name))).convert("1")
                picture.thumbnail((1024, 1024), Image.Resampling.NEAREST)  # masks can be larger than their images
                masks.append(np.asarray(picture).astype(np.uint8))
    masks = [mask for mask in masks if mask.any()]
    assert len(masks) > 50
    assert_targets_agree([(instance_of(mask), mask) for mask in masks])
    tiny = [mask[::12, ::12] for mask in masks if mask[::12, ::12].sum() >= 16]
    assert_targets_agree([(instance_of(mask), mask) for mask in tiny])


@pytest.mark.parametrize("side", [12, 84])
def test_rasterise_averages_the_interpolated_mask_over_each_cell(side):
    """Against brute force: 24 x 24 points per cell, each interpolated between the four nearest pixels."""
    rng = np.random.default_rng(1)
    mask = np.zeros((40, 50), np.uint8)
    mask[7:30, 5:41] = rng.random((23, 36)) < 0.6
    bitmap, frame = bitmap_of(mask, side)
    step_x, step_y = (frame[2] - frame[0]) / side / 24, (frame[3] - frame[1]) / side / 24
    x = frame[0] + step_x * (torch.arange(24 * side, dtype=torch.float64) + 0.5)
    y = frame[1] + step_y * (torch.arange(24 * side, dtype=torch.float64) + 0.5)
    grid_y, grid_x = torch.meshgrid(y / 40 * 2 - 1, x / 50 * 2 - 1, indexing="ij")
    image, grid = torch.from_numpy(mask)[None, None].double(), torch.stack((grid_x, grid_y), dim=-1)[None]
    values = torch.nn.functional.grid_sample(image, grid, padding_mode="border", align_corners=False)
    expected = torch.nn.functional.avg_pool2d(values, 24)[0, 0] * 255
    assert (bitmap.double() - expected).abs().max() <= 1


def test_rasterise_keeps_the_area_and_an_empty_border():
    for mask in (m for size in (9, 60, 300) for m in procedural_masks(size, 4)):
        padded = np.pad(mask, 2)  # nothing touches the image's border
        bitmap, (x0, y0, x1, y1) = bitmap_of(padded)
        covered = bitmap.double().sum() / 255 * (x1 - x0) * (y1 - y0) / BITMAP**2
        assert float(covered) == pytest.approx(padded.sum(), rel=0.01)
        assert int(bitmap[[0, -1]].sum() + bitmap[:, [0, -1]].sum()) == 0


def test_rasterise_repeats_pixels_beyond_the_border_of_the_image():
    for mask in (np.eye(1, dtype=np.uint8), np.ones((600, 800), np.uint8)):
        bitmap, frame = bitmap_of(mask)
        assert bitmap[1:-1, 1:-1].min() == 255
        assert frame[0] < 0
        assert frame[2] > mask.shape[1]


def test_flip_equals_reading_the_flipped_mask():
    for mask in procedural_masks(120, 8):
        flipped, expected = instance_of(mask).flip(mask.shape[1]), instance_of(mask[:, ::-1])
        assert torch.equal(flipped.boxes, expected.boxes)
        assert torch.allclose(flipped.frames, expected.frames, atol=1e-3)
        assert (flipped.bitmaps.int() - expected.bitmaps.int()).abs().max() <= 1


@pytest.mark.parametrize("factors", [(0.75, 0.7), (1.6, 1.55)])
def test_scale_agrees_with_the_resized_mask(factors):
    pairs = []
    # No thin shapes: resizing a line of two pixels to a binary mask again changes it.
    for mask in procedural_masks(150, 12, shapes=("ellipse", "polygon", "ring")):
        width, height = round(mask.shape[1] * factors[0]), round(mask.shape[0] * factors[1])
        resized = np.array(Image.fromarray(mask * 255).resize((width, height), Image.Resampling.BILINEAR)) >= 128
        pairs.append((instance_of(mask).scale(width / mask.shape[1], height / mask.shape[0]), resized))
    assert_targets_agree(pairs)


def test_crop_agrees_with_the_cropped_mask():
    pairs = []
    for mask in procedural_masks(300, 8):
        x, y, w, h = (int(v) for v in rle.bounds(rle.encode(mask)))
        left, top = x + w // 4, y + h // 4  # a quarter of the object is cut off at the left and at the top
        cropped = instance_of(mask).crop(left, top, w, h)
        assert torch.equal(cropped.boxes, torch.tensor([[0.0, 0.0, w - w // 4, h - h // 4]]))
        pairs.append((cropped, mask[top : top + h, left : left + w]))
    assert target_errors(pairs)[0] < 0.01
