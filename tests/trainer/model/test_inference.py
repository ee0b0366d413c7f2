"""`detect` and `paste` give torchvision's detections in bounded memory, and handle thin images."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.roi_heads import paste_masks_in_image

from benchmarks.step_cost import StepCounter
from shards.format import rle
from tests.trainer.batches import narrow
from trainer.config.settings import DataConfig
from trainer.data.augment import scaled_size
from trainer.data.collate import EvalBatch
from trainer.model import detection, inference, paste
from trainer.model.build import build_model
from trainer.model.detection import sizes_of
from trainer.model.inference import Detections, detect, detect_batches
from trainer.model.paste import Paste
from trainer.step.host_copy import HostCopy

SIZES = ((90, 130), (200, 120), (64, 300), (33, 47))
CASES: dict[str, tuple[tuple[tuple[int, int], ...], int, dict[str, Any]]] = {  # images, classes, settings
    "several sizes": (SIZES, 4, {}),
    "one image": (SIZES[:1], 4, {"seed": 1}),
    "other input sizes": (SIZES, 4, {"min_size": 33, "max_size": 64}),
    "thin images": (((7, 600), (600, 9), (10, 10)), 4, {"min_size": 64, "max_size": 320}),
    "many classes": (SIZES, 81, {"score_threshold": 0.01}),
    "more detections than the limit": (SIZES, 4, {"score_threshold": 0.0, "detections_per_image": 3}),
    "some images without detections": (SIZES, 4, {"score_threshold": 0.95}),
    "no detections": (SIZES, 4, {"score_threshold": 1.0}),
    "few proposals": (SIZES, 4, {"rpn_post_nms": [2, 2]}),
    "another threshold of NMS": (SIZES, 4, {"nms_threshold": 0.1}),
    "frozen norms": (SIZES[:2], 4, {"norm": "frozen"}),
    "MobileNet": (SIZES[:2], 4, {"backbone": "mobilenet_v3_large"}),
    "version 2": (SIZES[:2], 4, {"version": "v2"}),
}


def random_network(
    classes: int = 4, *, seed: int = 0, min_size: int = 96, max_size: int = 160, **changes: Any
) -> MaskRCNN:
    """A network whose proposals, classes, boxes and masks differ from RoI to RoI."""
    few = {"rpn_pre_nms": [200, 100], "rpn_post_nms": [100, 50], "score_threshold": 0.05}
    widths = {"fpn_channels": 16, "box_head_features": 32, "mask_head_channels": [16]}
    model = narrow(anchor_sizes=[16, 32, 64, 128, 256], **{**few, **widths, **changes})
    torch.manual_seed(seed)
    network = build_model(model, DataConfig(min_size=min_size, max_size=max_size), classes).eval()
    heads = network.roi_heads
    spread = {network.rpn.head.cls_logits: 0.3, network.rpn.head.bbox_pred: 0.05}
    spread |= {heads.box_predictor.cls_score: 0.6, heads.box_predictor.bbox_pred: 0.1}
    for layer, std in (spread | {heads.mask_predictor.mask_fcn_logits: 0.8}).items():
        torch.nn.init.normal_(layer.weight, std=std)
    return network


def noise(sizes: Iterable[tuple[int, int]]) -> list[Tensor]:
    """Images, uint8 [3, H, W]."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, 256, (3, *size), dtype=torch.uint8, generator=generator) for size in sizes]


def assert_equal(found: Detections, expected: dict[str, Tensor]) -> None:
    """Compare with torchvision's output for an image."""
    for name in ("boxes", "labels", "scores"):
        np.testing.assert_allclose(getattr(found, name), expected[name].numpy(), rtol=0, atol=1e-5)
    for mask, other in zip(found.masks, expected["masks"], strict=True):
        np.testing.assert_array_equal(rle.decode(mask), (other[0] >= 0.5).numpy())


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_detect_gives_the_detections_of_torchvision(
    name: str, fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "in_fixed_shapes", lambda _: fixed_shapes)
    monkeypatch.setattr(paste, "PASTE_BYTES", 5000)  # groups of masks of more than one image
    sizes, classes, changes = CASES[name]
    network, images = random_network(classes, **changes), noise(sizes)
    with torch.no_grad():
        expected = network([image / 255 for image in images])
    for given in (images, [image / 255 for image in images]):
        for found, entry in zip(detect(network, given, "cpu"), expected, strict=True):
            assert_equal(found, entry)
    counts = [len(entry["scores"]) for entry in expected]
    assert (sum(counts) > 5) == (name != "no detections")
    assert (0 in counts) == (name in ("no detections", "some images without detections"))
    assert (set(counts) == {3}) == (name == "more detections than the limit")


def test_detect_reports_training_mode() -> None:
    with pytest.raises(RuntimeError, match="call eval"):
        detect(random_network().train(), noise(SIZES), "cpu")


def test_the_host_waits_three_times_whatever_the_batch_size(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detection, "in_fixed_shapes", lambda _: True)  # as on a GPU
    waits = Mock(side_effect=HostCopy.wait, autospec=True)
    monkeypatch.setattr(HostCopy, "wait", lambda copy: waits(copy))
    network = random_network()
    for count in (1, 2, 6):
        waits.reset_mock()
        with StepCounter() as counter:
            found = detect(network, noise([(90, 130), (64, 80)] * 3)[:count], "cpu")
        assert len(found[-1]) > 0
        assert waits.call_count == 3  # for the numbers of candidates, the boxes and the masks
        # One of these is `HostCopy.read`; nothing else reads a tensor, or has a shape that depends on values.
        assert sum(counter.synchronisations.values()) == 1


def test_batches_are_detected_in_order_and_ahead_of_the_caller() -> None:
    network, images, events = random_network(), noise(SIZES * 2), list[str]()

    def batches() -> Iterator[list[Tensor]]:
        for number, image in enumerate(images):
            events.append(f"queue {number}")
            yield [image]

    found = list[Detections]()
    for [each] in inference._detections(network, batches(), torch.device("cpu"), ahead=1):
        events.append(f"finish {len(found)}")
        found.append(each)
    assert events[:6] == ["queue 0", "queue 1", "queue 2", "queue 3", "finish 0", "queue 4"]
    assert events[-3:] == ["finish 5", "finish 6", "finish 7"]
    eval_batches = [EvalBatch([image], []) for image in images]
    at_once = list(detect_batches(network, eval_batches, torch.device("cpu")))
    assert [batch for batch, _ in at_once] == eval_batches
    for one, (_, [other]) in zip(found, at_once, strict=True):
        np.testing.assert_array_equal(one.boxes, other.boxes)
        assert one.masks == other.masks


@pytest.mark.parametrize("thin", [(3, 600), (600, 1), (5, 600), (1, 1)])
def test_detect_resizes_a_thin_image_as_training_does(thin: tuple[int, int]) -> None:
    network = random_network(score_threshold=0.0, min_size=64, max_size=64)
    image, other = noise([thin, (48, 64)])
    resized = sizes_of(network, [image, other]).resized.tolist()
    assert resized == [list(scaled_size(*size, 64, 64)) for size in (thin, (48, 64))]
    found = detect(network, [image, other], "cpu")
    assert len(found[1]) > 0
    assert np.isfinite(found[0].boxes).all()
    assert all((mask.height, mask.width) == thin for mask in found[0].masks)
    assert (found[0].boxes <= np.array([thin[1], thin[0]] * 2)).all()


def test_detect_without_detections() -> None:
    (found,) = detect(random_network(score_threshold=1.0), noise([(40, 50)]), "cpu")
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
    return Paste(masks[:, 0], boxes.numpy(), np.array([[height, width]] * len(boxes)).reshape(-1, 2)).encode()


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
