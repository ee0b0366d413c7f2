"""`Trainable`, against torchvision's own network in training mode with full-size masks."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.trainer.batches import LOSSES, SCENES, batch_of, gradients, losses_of, scene, small_network, without_masks
from trainer.config.settings import LossConfig
from trainer.data.instances import Batch
from trainer.model.losses import image_list, targets_of


@pytest.fixture(scope="module")
def network():
    return small_network()


def torchvision_losses(network, scenes, batch: Batch) -> dict[str, Tensor]:
    """The losses of torchvision's forward for the same images, without its resizing, with full-size masks."""
    stock = copy.deepcopy(network)
    stock.transform._skip_resize = True
    targets = [
        {"boxes": boxes, "labels": labels, "masks": torch.from_numpy(np.array(masks)).reshape(-1, *image.shape[-2:])}
        for (image, masks, labels), boxes in zip(scenes, batch.boxes.split(batch.counts.tolist()), strict=True)
    ]
    torch.manual_seed(7)
    return stock([image.float() / 255 for image, _, _ in scenes], targets)


def test_losses_are_torchvisions(network):
    batch = batch_of(SCENES)
    found, expected = losses_of(network, batch), torchvision_losses(network, SCENES, batch)
    for name in LOSSES - {"loss_mask"}:
        assert torch.equal(found[name], expected[name]), name
    assert found["loss_mask"].item() > 0.3
    assert found["loss_mask"].item() == pytest.approx(expected["loss_mask"].item(), rel=5e-3)


def test_a_box_without_a_mask_trains_class_and_box_only(network):
    batch = batch_of(SCENES)
    keep = torch.tensor([True, False] * 6)[: len(batch.labels)]
    full, part = losses_of(network, batch), losses_of(network, without_masks(batch, keep))
    for name in LOSSES - {"loss_mask"}:
        assert torch.equal(full[name], part[name]), name

    # The mask loss is the mean over the RoIs with a mask: the two parts, weighted by their RoIs, make up the whole.
    rest = losses_of(network, without_masks(batch, ~keep))
    whole, kept, others = (losses["loss_mask"].item() for losses in (full, part, rest))
    rois, rois_kept = positive_rois(network, batch, keep)
    assert 0 < rois_kept < rois
    assert kept * rois_kept + others * (rois - rois_kept) == pytest.approx(whole * rois, rel=1e-4)


def positive_rois(network, batch: Batch, keep: Tensor) -> tuple[int, int]:
    """How many RoIs are positive under the seed of `losses_of`, and how many of them belong to the objects `keep`."""
    torch.manual_seed(7)
    images, targets = image_list(batch, network), targets_of(batch, LossConfig())
    proposals, _ = network.rpn(images, network.backbone(images.tensors), targets)
    _, matched, labels, _ = network.roi_heads.select_training_samples(proposals, targets)
    own = [o[of_image[c > 0]] for o, of_image, c in zip(keep.split(batch.counts.tolist()), matched, labels) if len(o)]
    return sum(len(one) for one in own), int(sum(one.sum() for one in own))


@pytest.mark.parametrize("objects", [3, 0])
def test_without_masks_the_mask_loss_is_zero_and_reaches_every_parameter(network, objects):
    batch = batch_of([scene(5, 128, 128, objects), scene(6, 96, 128, objects)])
    losses = losses_of(network, without_masks(batch, torch.zeros(len(batch.labels), dtype=torch.bool)))
    assert losses["loss_mask"].item() == 0
    trained = {name for name, gradient in gradients(network, losses).items() if gradient.any()}
    assert not any("mask" in name for name in trained)
    assert ("roi_heads.box_predictor.bbox_pred.weight" in trained) == (objects > 0)


def test_a_few_steps_lower_the_loss(network):
    copied, batch, totals = copy.deepcopy(network), batch_of(SCENES[:2]), []
    optimizer = torch.optim.SGD([p for p in copied.parameters() if p.requires_grad], lr=0.002, momentum=0.9)
    for _ in range(5):
        loss = torch.stack(list(losses_of(copied, batch).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(copied.parameters(), 1.0)
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < totals[0]
