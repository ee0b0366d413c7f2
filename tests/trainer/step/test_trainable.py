"""`Trainable`, against torchvision's own functions image by image, given the same random keys."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor
from torchvision.models.detection import MaskRCNN

from tests.trainer.batches import (
    LOSSES,
    SCENES,
    batch_of,
    gradients,
    losses_of,
    scene,
    small_network,
    with_predictions,
    without_masks,
)
from tests.trainer.step.reference import reference_losses
from trainer.config.settings import LossConfig
from trainer.data.instances import GROUP_OF, HAS_MASK, IGNORED, Batch
from trainer.step.ground_truth import ground_truth_of
from trainer.step.proposals import propose
from trainer.step.trainable import Trainable

BATCH = batch_of(SCENES)
IS_GROUP = torch.zeros_like(BATCH.labels, dtype=torch.bool)
IS_GROUP[0, 0] = IS_GROUP[3, 1] = True  # among other objects, and over the middle of an image
HALF = (torch.arange(BATCH.labels.shape[1]) % 2 == 0).expand_as(BATCH.labels)
VERIFIED = torch.tensor([[1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 1, 1]]).bool()[:, None]
PARTLY = replace(BATCH, verified=VERIFIED)
# As mosaics that meet at 60, 50, whose four tiles have different classes verified.
MOSAICS = replace(
    BATCH,
    tiles=torch.tensor([[0.0, 0, 60, 50], [60, 0, 160, 50], [0, 50, 60, 128], [60, 50, 160, 128]]).expand(4, 4, 4),
    verified=torch.stack([VERIFIED[:, 0].roll(i, dims=0) for i in range(4)], dim=1),
)


@pytest.fixture(scope="module")
def network() -> MaskRCNN:
    """A network whose objectness and boxes differ between anchors, and so do its proposals."""
    network = small_network()
    torch.manual_seed(1)
    torch.nn.init.normal_(network.rpn.head.cls_logits.weight, std=0.3)
    torch.nn.init.normal_(network.rpn.head.bbox_pred.weight, std=0.05)
    return network


def crowded() -> Batch:
    """`BATCH` with two group-of boxes, each over a good part of its image."""
    boxes = BATCH.boxes.clone()
    boxes[0, 0], boxes[3, 1] = torch.tensor([[8.0, 8, 120, 90], [20.0, 4, 100, 120]])
    return replace(BATCH, boxes=boxes, flags=(BATCH.flags | IS_GROUP * GROUP_OF).byte())


def covered() -> Batch:
    """Images without padding, each exactly covered by a group-of box: anchors that leave the image are in it, too."""
    boxes, (height, width) = BATCH.boxes.clone(), BATCH.images.shape[-2:]
    boxes[:, 0] = torch.tensor([0, 0, width, height])
    first = torch.zeros_like(BATCH.labels)
    first[:, 0] = 1
    sizes = torch.tensor([height, width]).expand(len(BATCH), 2)
    return replace(BATCH, sizes=sizes, boxes=boxes, labels=first, flags=(first * GROUP_OF).byte())


def without(batch: Batch, removed: Tensor) -> Batch:
    """The batch without some annotations, bool [B, G]."""
    return replace(batch, labels=batch.labels * ~removed, flags=batch.flags * ~removed)


CAPPED = replace(crowded(), flags=torch.where(IS_GROUP, IGNORED, BATCH.flags).byte())  # as beyond `max_instances`
CASES = {
    "masks everywhere": (BATCH, LossConfig()),
    "boxes without masks": (without_masks(BATCH, HALF), LossConfig()),
    "boxes without masks as background": (without_masks(BATCH, HALF), LossConfig(unmasked="background")),
    "predicted masks": (with_predictions(BATCH, HALF), LossConfig(predicted=0.3)),
    "groups ignored": (crowded(), LossConfig()),
    "groups as objects": (crowded(), LossConfig(group_of="object")),
    "groups as background": (crowded(), LossConfig(group_of="background")),
    "ignored beyond the cap": (CAPPED, LossConfig(group_of="object")),
    "unverified classes": (PARTLY, LossConfig()),
    "unverified classes as absent": (PARTLY, LossConfig(unverified="absent")),
    "unverified classes of the tiles of mosaics": (MOSAICS, LossConfig()),
    "no objects": (batch_of([scene(5, 128, 128, 0), scene(6, 96, 128, 0)]), LossConfig()),
    "everything": (replace(without_masks(crowded(), HALF), verified=VERIFIED), LossConfig()),
}


@pytest.mark.parametrize("fixed_shapes", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_losses_and_gradients_equal_torchvisions(network: MaskRCNN, name: str, fixed_shapes: bool) -> None:
    batch, loss = CASES[name]
    step = Trainable(network, loss, fixed_shapes=fixed_shapes)
    torch.manual_seed(3)
    keys = step.draw_keys(batch)
    found, expected = step(batch, keys), reference_losses(network, batch, keys, loss)
    assert set(found) == LOSSES
    for one in LOSSES:
        assert found[one].item() == pytest.approx(expected[one].item(), rel=1e-6, abs=1e-7), one
    own, others = gradients(network, found), gradients(network, expected)
    for parameter, gradient in others.items():
        assert (own[parameter] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, parameter


def test_comparing_one_object_at_a_time_changes_nothing(network: MaskRCNN, monkeypatch: pytest.MonkeyPatch) -> None:
    batch, step = crowded(), Trainable(network)
    keys = step.draw_keys(batch)
    expected = step(batch, keys)
    monkeypatch.setattr("trainer.step.matching.CHUNK_BYTES", 1)
    found = step(batch, keys)
    assert all(torch.equal(found[one], expected[one]) for one in LOSSES)


@pytest.mark.parametrize("rois", [16, 400])
def test_fewer_proposals_than_slots_and_more(rois: int) -> None:
    network = small_network()
    network.roi_heads.fg_bg_sampler.batch_size_per_image = rois
    step = Trainable(network, fixed_shapes=True)
    keys = step.draw_keys(BATCH)
    found, expected = step(BATCH, keys), reference_losses(network, BATCH, keys)
    for one in LOSSES:
        assert found[one].item() == pytest.approx(expected[one].item(), rel=1e-6), one


@pytest.mark.parametrize("fixed_shapes", [False, True])
def test_regions_all_over_every_image_give_zero_losses_that_reach_every_parameter(
    network: MaskRCNN, fixed_shapes: bool
) -> None:
    losses = Trainable(network, fixed_shapes=fixed_shapes)(covered())
    assert all(loss.item() == 0 for loss in losses.values())
    assert not any(gradient.any() for gradient in gradients(network, losses).values())


EQUIVALENT = {
    "unmasked as background": (without_masks(BATCH, HALF), LossConfig(unmasked="background"), without(BATCH, ~HALF)),
    "predicted masks of full weight": (with_predictions(BATCH, HALF), LossConfig(), BATCH),
    "predicted masks of no weight": (
        with_predictions(BATCH, HALF),
        LossConfig(predicted=0),
        without_masks(BATCH, ~HALF),
    ),
    "groups as background": (crowded(), LossConfig(group_of="background"), without(crowded(), IS_GROUP)),
    "groups as objects": (crowded(), LossConfig(group_of="object"), replace(crowded(), flags=BATCH.flags)),
    "capped, groups as objects": (CAPPED, LossConfig(group_of="object"), crowded()),
    "unverified classes as absent": (PARTLY, LossConfig(unverified="absent"), BATCH),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_losses_equal_those_of_the_equivalent_batch(network: MaskRCNN, name: str) -> None:
    batch, loss, equivalent = EQUIVALENT[name]
    found, expected = losses_of(network, batch, loss), losses_of(network, equivalent)
    assert all(torch.equal(found[one], expected[one]) for one in LOSSES)


def test_the_mask_loss_is_close_to_that_of_full_size_masks(network: MaskRCNN) -> None:
    stock = copy.deepcopy(network)
    stock.transform._skip_resize = True
    targets = [
        {
            "boxes": boxes[: len(labels)],
            "labels": labels,
            "masks": torch.from_numpy(np.array(masks)).reshape(-1, *image.shape[-2:]),
        }
        for (image, masks, labels), boxes in zip(SCENES, BATCH.boxes, strict=True)
    ]
    # All anchors and RoIs train, so the random choice does not matter.
    for one in (stock, trained := copy.deepcopy(network)):
        for sampler in (one.rpn.fg_bg_sampler, one.roi_heads.fg_bg_sampler):
            sampler.batch_size_per_image, sampler.positive_fraction = 10**6, 0.5
    found = Trainable(trained)(BATCH)
    expected = stock([image.float() / 255 for image, _, _ in SCENES], targets)
    for name in LOSSES:
        rel = 5e-3 if name == "loss_mask" else 1e-6
        assert found[name].item() == pytest.approx(expected[name].item(), rel=rel), name


def test_without_masks_the_mask_loss_is_zero_and_trains_nothing(network: MaskRCNN) -> None:
    losses = losses_of(network, without_masks(BATCH, torch.zeros_like(HALF)))
    assert losses["loss_mask"].item() == 0
    trained = {name for name, gradient in gradients(network, losses).items() if gradient.any()}
    assert not any("mask" in name for name in trained)
    assert "roi_heads.box_predictor.bbox_pred.weight" in trained


def test_under_bfloat16_losses_are_float32_and_anchors_exact(network: MaskRCNN) -> None:
    step = Trainable(network)
    with torch.autocast("cpu", torch.bfloat16):
        losses = step(replace(crowded(), verified=VERIFIED))
    assert step.anchors_of(BATCH).boxes.dtype == torch.float32
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses.values())


def test_batch_norms_in_heads_see_only_rois_that_train() -> None:
    """Norms of the mask head would mix RoIs that fill up its slots into their statistics."""
    network = small_network()
    norm, seen = torch.nn.BatchNorm2d(16), list[int]()
    network.roi_heads.mask_head = torch.nn.Sequential(norm, network.roi_heads.mask_head)
    norm.register_forward_hook(lambda _module, given, _made: seen.append(len(given[0])))
    step = Trainable(network.train(), fixed_shapes=True)
    keys = step.draw_keys(BATCH)
    step(BATCH, keys)
    with torch.no_grad():
        _, logits, deltas = step.backbone_stage(BATCH.images, BATCH.sizes)
        truth = ground_truth_of(BATCH, LossConfig())
        rois, _ = step.proposal_stage(logits, deltas, BATCH.sizes, step.anchors_of(BATCH), truth, keys)
    assert seen == [int(rois.has_mask.sum())]


def test_padding_of_the_annotations_changes_nothing(network: MaskRCNN) -> None:
    """More rows of padding, as in a batch with a crowded image."""

    def padded(name: str, *sides: int, value: float = 0.0) -> Tensor:
        return torch.nn.functional.pad(getattr(BATCH, name), sides, value=value)

    wide = replace(
        BATCH,
        labels=padded("labels", 0, 8),
        flags=padded("flags", 0, 8),
        boxes=padded("boxes", 0, 0, 0, 8, value=7.0),
        frames=padded("frames", 0, 0, 0, 8, value=7.0),
        bitmaps=padded("bitmaps", 0, 0, 0, 0, 0, 8),
    )
    assert int(wide.flags.max()) == HAS_MASK
    step = Trainable(network)
    keys = step.draw_keys(BATCH)
    more = keys._replace(proposals=torch.nn.functional.pad(keys.proposals, (0, 8)))
    found, expected = step(wide, more), step(BATCH, keys)
    assert all(found[name].item() == pytest.approx(expected[name].item(), rel=1e-6) for name in LOSSES)


def test_proposals_are_inside_their_images_also_of_a_network_that_diverged(network: MaskRCNN) -> None:
    """torchvision's roi_align ends the process at a box that is NaN, on a CPU."""
    step = Trainable(network)
    anchors = step.anchors_of(BATCH)
    with torch.no_grad():
        _, logits, deltas = step.backbone_stage(BATCH.images, BATCH.sizes)
        proposals = [propose(network.rpn, anchors, logits, deltas * scale, BATCH.sizes) for scale in (1e3, torch.nan)]
    for found in proposals:
        assert ((found.boxes >= 0) & (found.boxes <= BATCH.sizes.flip(1).repeat(1, 2)[:, None])).all()
    assert proposals[0].valid.any()
    assert not proposals[1].valid.any()


def test_a_few_steps_lower_the_loss(network: MaskRCNN) -> None:
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
