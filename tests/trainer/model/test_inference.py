"""`detect` and `paste` give torchvision's detections in bounded memory, and handle thin images."""

from pathlib import Path

import numpy as np
import pytest
import torch
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from shards.format import rle
from tests.support import REPOSITORY
from tests.trainer import tiny
from trainer.commands import train
from trainer.data.augment import scaled_size
from trainer.model import paste
from trainer.model.build import build_model
from trainer.model.detection import sizes_of
from trainer.model.inference import detect
from trainer.model.paste import Paste


def small_network(**changes: object) -> MaskRCNN:
    """An untrained network for images of 64 pixels."""
    config = train.parse(tiny.arguments(REPOSITORY, REPOSITORY, **changes))
    torch.manual_seed(0)
    return build_model(config.model, config.data, 3).eval()


@pytest.mark.parametrize("limit", [1, 2**30])
def test_detect_gives_the_detections_of_torchvision(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paste, "PASTE_BYTES", limit)  # one mask at a time, or all at once
    network = small_network()
    images = [torch.randint(0, 256, (3, h, w), dtype=torch.uint8) for h, w in ((90, 130), (64, 64))]
    with torch.no_grad():
        expected = network([image / 255 for image in images])
    for found, entry in zip(detect(network, images, "cpu"), expected, strict=True):
        assert len(found) > 5
        for name in ("boxes", "labels", "scores"):
            np.testing.assert_array_equal(getattr(found, name), entry[name].numpy())
        masks = np.stack([rle.decode(mask) for mask in found.masks])
        np.testing.assert_array_equal(masks, (entry["masks"][:, 0] >= 0.5).numpy())
    with pytest.raises(RuntimeError, match="call eval"):
        detect(network.train(), images, "cpu")


@pytest.mark.parametrize("thin", [(3, 600), (600, 1), (5, 600), (1, 1)])
def test_detect_resizes_a_thin_image_as_training_does(thin: tuple[int, int]) -> None:
    network = small_network(model__score_threshold=0.0)
    image, other = (torch.randint(0, 256, (3, *size), dtype=torch.uint8) for size in (thin, (48, 64)))
    resized = sizes_of(network, [image, other]).resized.tolist()
    assert resized == [list(scaled_size(*size, 64, 64)) for size in (thin, (48, 64))]
    found = detect(network, [image, other], "cpu")
    assert len(found[1]) > 0
    assert np.isfinite(found[0].boxes).all()
    assert all((mask.height, mask.width) == thin for mask in found[0].masks)
    assert (found[0].boxes <= np.array([thin[1], thin[0]] * 2)).all()


def test_detect_without_detections() -> None:
    (found,) = detect(small_network(model__score_threshold=1.0), [torch.zeros((3, 40, 50), dtype=torch.uint8)], "cpu")
    assert (len(found), found.boxes.shape, found.masks, found.instances()) == (0, (0, 4), (), [])


def random_masks(count: int, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Smooth blobs in boxes of all sizes, some beyond the image's border, some without an area."""
    generator = torch.Generator().manual_seed(count)
    coarse = torch.rand((count, 1, 5, 5), generator=generator)
    masks = torch.nn.functional.interpolate(coarse, size=(28, 28), mode="bilinear")
    corners = torch.rand((count, 2, 2), generator=generator) * torch.tensor([width, height]) * 1.1 - 4
    boxes = torch.cat((corners.min(1).values, corners.max(1).values), dim=1)
    boxes[0, 2:] = boxes[0, :2]
    boxes[1] = torch.tensor([0.0, 0.0, width, height])
    return masks, boxes


def encoded(masks: torch.Tensor, boxes: torch.Tensor, height: int, width: int) -> list[rle.Rle]:
    """The masks of one image, [N, 1, M, M], as `Paste` encodes them."""
    return Paste(masks[:, 0], boxes, torch.tensor([[height, width]]).expand(len(boxes), -1)).encode()


@pytest.mark.parametrize("limit", [1, 3000, 2**30])
def test_paste_gives_the_masks_of_torchvision(limit: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(paste, "PASTE_BYTES", limit)
    height, width = 61, 90
    masks, boxes = random_masks(40, height, width)
    expected = (paste_masks_in_image(masks, boxes, (height, width))[:, 0] >= 0.5).numpy()
    assert expected.any(axis=(1, 2)).sum() > 30
    assert encoded(masks, boxes, height, width) == [rle.encode(mask) for mask in expected]
    assert encoded(masks[:0], boxes[:0], height, width) == []


def test_paste_gives_an_empty_mask_for_a_box_outside_the_image() -> None:
    masks, _ = random_masks(3, 50, 50)
    pasted = encoded(masks, torch.tensor([[60.0, 10, 80, 30], [-40, -40, -20, -20], [10, 70, 30, 90]]), 50, 50)
    assert [rle.area(mask) for mask in pasted] == [0, 0, 0]


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="reads the peak memory from Linux's /proc")
def test_paste_of_many_masks_on_a_large_photograph_stays_within_its_memory_limit() -> None:
    height, width = 3000, 4000
    masks, boxes = random_masks(10, height, width)
    boxes[:] = torch.tensor([0.0, 0.0, width, height])  # the worst case; all masks together take 480 MB as float
    encoded(masks[:1], boxes[:1], height, width)
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    before = resident("VmRSS")
    encoded(masks, boxes, height, width)
    assert resident("VmHWM") - before < 2 * paste.PASTE_BYTES + 10 * height * width


def resident(name: str) -> int:
    """An entry of /proc/self/status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
