"""Masks of given boxes are those of torchvision's mask branch, inside the boxes."""

from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from shards.format import rle
from tests.trainer.model.test_inference import SIZES, noise, random_network
from trainer.model import box_masks, detection, paste
from trainer.model.box_masks import mask_batches


class Picture(NamedTuple):
    pixels: torch.Tensor
    boxes: NDArray[np.float32]
    labels: NDArray[np.int64]


class Pictures(NamedTuple):
    items: list[Picture]


def boxed(counts: tuple[int, ...], sides: tuple[float, float] = (0.1, 0.9)) -> list[Picture]:
    """Pictures of SIZES with that many random boxes each, whose sides are between these shares of the picture's."""
    rng = np.random.default_rng(0)
    pictures = []
    for pixels, count in zip(noise(SIZES), counts, strict=True):
        height, width = pixels.shape[-2:]
        shares = rng.uniform(*sides, (count, 2))
        corners = rng.uniform(0, 1, (count, 2)) * (1 - shares)
        boxes = np.concatenate((corners, corners + shares), axis=1) * [width, height, width, height]
        pictures.append(Picture(pixels, boxes.astype(np.float32), rng.integers(1, 4, count)))
    return pictures


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize(("changes", "margin"), [({}, 0.0), ({"mask_head": "agnostic"}, 0.1)])
def test_masks_of_boxes_are_those_of_torchvision_inside_the_boxes(
    changes: dict[str, Any], margin: float, fixed_shapes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(detection, "in_fixed_shapes", lambda _: fixed_shapes)
    monkeypatch.setattr(paste, "PASTE_BYTES", 5000)
    monkeypatch.setattr(box_masks, "ROIS_AT_ONCE", 7)  # chunks of more than one image, and parts of one
    network, pictures = random_network(**changes), boxed((3, 9, 1, 4))
    [(batch, found)] = mask_batches(network, [Pictures(pictures)], torch.device("cpu"), margin)
    assert batch.items is pictures
    extended = [torch.from_numpy(one.boxes) for one in pictures]
    extended = [boxes + margin * (boxes - boxes[:, [2, 3, 0, 1]]) for boxes in extended]

    def detections(*_: Any) -> tuple[list[torch.Tensor], ...]:
        """The boxes as torchvision's own detections, in pixels of its resized images."""
        _, targets = network.transform(images, [{"boxes": boxes} for boxes in extended])
        labels = [torch.from_numpy(one.labels) for one in pictures]
        return [target["boxes"] for target in targets], [torch.ones(len(each)) for each in labels], labels

    cells: list[torch.Tensor] = []  # the masks of each picture before they are pasted, [N, 1, M, M]
    paste_all = network.transform.postprocess

    def postprocess(result: list[dict[str, torch.Tensor]], *sizes: Any) -> Any:
        cells.extend(entry["masks"] for entry in result)
        return paste_all(result, *sizes)

    images = [one.pixels / 255 for one in pictures]
    monkeypatch.setattr(network.transform, "postprocess", postprocess)
    monkeypatch.setattr(network.roi_heads, "postprocess_detections", detections)
    with torch.no_grad():
        expected = network(images)
    masks = 0
    for picture, own, entry, of_image in zip(pictures, found, expected, cells, strict=True):
        pasted = entry["masks"][:, 0].numpy()
        for box, (mask, score), full, cell in zip(picture.boxes, own, pasted, of_image, strict=True):
            window = np.zeros(full.shape, bool)
            window[int(box[1]) : int(np.ceil(box[3])), int(box[0]) : int(np.ceil(box[2]))] = True
            inside = (full >= 0.5) & window
            assert (mask is None) == (not inside.any())
            if mask is not None:
                masks += 1
                np.testing.assert_array_equal(rle.decode(mask), inside)
                assert score == pytest.approx(cell[cell >= 0.5].mean().item(), abs=1e-4)
    assert masks > 10


def test_a_box_without_a_mask_has_none_and_thin_boxes_are_no_error() -> None:
    network, [picture, *_] = random_network(), boxed((1, 0, 0, 0))
    logits = network.roi_heads.mask_predictor.mask_fcn_logits
    torch.nn.init.zeros_(logits.weight)
    boxes = np.array([[5, 5, 60, 50], [7.2, 7.2, 7.2, 30], [129.5, 89.5, 130, 90]], np.float32)
    for bias, expected in ((-2.0, [None] * 3), (2.0, [55 * 45, 23, 1])):
        torch.nn.init.constant_(logits.bias, bias)
        batch = Pictures([picture._replace(boxes=boxes, labels=np.array([1, 2, 3]))])
        [(_, [found])] = mask_batches(network, [batch], torch.device("cpu"))
        for (mask, score), area in zip(found, expected, strict=True):
            assert (None if mask is None else rle.area(mask)) == area
            assert score == pytest.approx(1 / (1 + np.exp(-bias)) if area else 0, abs=1e-4)
