"""Incomplete annotations: the arithmetic against slow loops, the losses and gradients in a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import fastrcnn_loss

from tests.trainer.batches import LOSSES, SCENES, batch_of, gradients, losses_of, small_network, without_masks
from trainer.config.settings import LossConfig
from trainer.data.instances import GROUP_OF, IGNORED, Batch
from trainer.model.losses import image_list, sample_rois, targets_of
from trainer.model.partial_labels import are_inside, merge_unverified, verified_table

ALL = 10**6  # a sampler of this size chooses every anchor and RoI


@pytest.fixture(scope="module")
def network() -> MaskRCNN:
    return small_network()


@pytest.fixture(scope="module")
def thorough(network: MaskRCNN) -> MaskRCNN:
    """The same network, trained on every anchor and every proposal, with objectness that differs between anchors."""
    copied = copy.deepcopy(network)
    copied.rpn.head.cls_logits.weight.data *= 300
    copied.rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(ALL, 0.5)
    copied.roi_heads.fg_bg_sampler = BalancedPositiveNegativeSampler(ALL, 0.5)
    return copied


def without(batch: Batch, removed: Tensor) -> Batch:
    """The batch without the instances `removed`, bool [M]."""
    counts = torch.stack([(~part).sum() for part in removed.split(batch.counts.tolist())])
    columns = ("boxes", "labels", "flags", "bitmaps", "frames")
    return replace(batch, counts=counts, **{name: getattr(batch, name)[~removed] for name in columns})


@contextmanager
def captured(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """The outputs of a module in this context, call after call."""
    outputs: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...] | list[Tensor]) -> None:
        outputs.extend([output] if isinstance(output, Tensor) else output)

    with module.register_forward_hook(keep):
        yield outputs


# Arithmetic


def slow_is_inside(box: list[float], regions: list[list[float]]) -> bool:
    area = (box[2] - box[0]) * (box[3] - box[1])
    for region in regions:
        across, down = (min(box[k + 2], region[k + 2]) - max(box[k], region[k]) for k in (0, 1))
        if across > 0 and down > 0 and across * down / area >= 0.5:
            return True
    return False


# Whole pixels, so that loops and tensors compute equal numbers, a share of exactly one half among them.
corner, side = st.integers(-20, 40), st.integers(1, 40)
boxes = st.tuples(corner, corner, side, side).map(lambda b: [float(v) for v in (b[0], b[1], b[0] + b[2], b[1] + b[3])])


@given(st.lists(boxes, min_size=1, max_size=12), st.lists(boxes, max_size=40))
def test_are_inside_equals_a_loop(some, regions):
    found = are_inside(torch.tensor(some), torch.tensor(regions).reshape(-1, 4))
    assert found.tolist() == [slow_is_inside(box, regions) for box in some]


@settings(max_examples=60)
@given(st.data())
def test_cross_entropy_of_merged_logits_equals_a_slow_softmax(data):
    rows = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    verified = [data.draw(st.none() | st.lists(st.integers(1, 4), unique=True).map(tuple)) for _ in rows]
    labels = [
        torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype=torch.int64) for n in rows
    ]
    table = verified_table(verified, 5)
    assert (table is None) == all(known is None or len(known) == 4 for known in verified)
    if table is None or not sum(rows):
        return
    logits = torch.randn((sum(rows), 5), generator=torch.Generator().manual_seed(sum(rows)), requires_grad=True)
    merged = merge_unverified(logits, labels, table)
    loss, _ = fastrcnn_loss(merged, torch.zeros(sum(rows), 20), labels, [torch.zeros(n, 4) for n in rows])
    [gradients_of_logits] = torch.autograd.grad(loss, [logits])
    total, images = 0.0, [i for i, n in enumerate(rows) for _ in range(n)]
    for row, image, label in zip(range(sum(rows)), images, torch.cat(labels).tolist(), strict=True):
        known = verified[image]
        unverified = [] if known is None else [c for c in range(1, 5) if c not in known]
        possible = [0, *unverified] if label == 0 else [label]
        exponentials = [math.exp(value) for value in logits[row].tolist()]
        total -= math.log(sum(exponentials[c] for c in possible) / sum(exponentials))
        for c in range(5):  # possible classes are raised, or left alone if all are possible; all others are lowered
            gradient = gradients_of_logits[row, c].item()
            assert (gradient < 1e-7) if c in possible else (gradient > 0)
    assert loss.item() == pytest.approx(total / sum(rows), rel=1e-5, abs=1e-6)


# Treatments that equal training without them on another batch

GROUPS = [0, 5]  # one among other objects, and one over the middle of an image
BATCH = batch_of(SCENES)
IS_GROUP = torch.zeros(len(BATCH.labels), dtype=torch.bool)
IS_GROUP[GROUPS] = True
UNMASKED = torch.tensor([False, True] * 6)[: len(BATCH.labels)]
NO_MASKS = without_masks(BATCH, ~UNMASKED)
PARTLY = replace(BATCH, verified=((), (1,), None, (2, 3)))


def crowded() -> Batch:
    """`BATCH` with two group-of boxes, each over a good part of its image."""
    places = BATCH.boxes.clone()
    places[GROUPS] = torch.tensor([[8.0, 8, 120, 90], [20.0, 4, 100, 120]])
    return replace(BATCH, boxes=places, flags=BATCH.flags | IS_GROUP * GROUP_OF)


# With IGNORED instead of GROUP_OF, as beyond `max_instances`.
CAPPED = replace(crowded(), flags=torch.where(IS_GROUP, IGNORED, BATCH.flags).byte())
EQUIVALENT = {
    "unmasked as background": (NO_MASKS, LossConfig(unmasked="background"), without(BATCH, UNMASKED)),
    "groups as background": (crowded(), LossConfig(group_of="background"), without(crowded(), IS_GROUP)),
    "groups as objects": (crowded(), LossConfig(group_of="object"), replace(crowded(), flags=BATCH.flags)),
    "capped, groups ignored": (CAPPED, LossConfig(), crowded()),
    "capped, groups as objects": (CAPPED, LossConfig(group_of="object"), crowded()),
    "capped, groups as background": (CAPPED, LossConfig(group_of="background"), crowded()),
    "all classes verified": (replace(BATCH, verified=((1, 2, 3),) * 4), LossConfig(), BATCH),
    "unverified classes as absent": (PARTLY, LossConfig(unverified="absent"), BATCH),
}


@pytest.mark.parametrize("name", EQUIVALENT)
def test_losses_equal_those_of_the_equivalent_batch(network, name):
    batch, loss, equivalent = EQUIVALENT[name]
    found, expected = losses_of(network, batch, loss), losses_of(network, equivalent)
    assert all(torch.equal(found[name], expected[name]) for name in LOSSES)


# Group-of regions


def regions_of(batch: Batch) -> list[list[list[float]]]:
    groups = (batch.flags & (GROUP_OF | IGNORED)) != 0
    counts = batch.counts.tolist()
    return [b[g].tolist() for b, g in zip(batch.boxes.split(counts), groups.split(counts), strict=True)]


def slow_objectness(network: MaskRCNN, batch: Batch) -> tuple[float, Tensor, Tensor]:
    """The objectness loss over all anchors that are not ignored, one by one.

    Returns:
        The loss, which anchors are ignored because of a region, and which train: bool [B, A].
    """
    images = image_list(batch, network)
    with torch.no_grad(), captured(network.rpn.head.cls_logits) as maps:
        features = list(network.backbone(images.tensors).values())
        network.rpn.head(features)
    anchors = network.rpn.anchor_generator(images, features)
    labels, _ = network.rpn.assign_targets_to_anchors(anchors, targets_of(batch, LossConfig()))  # without regions
    logits = torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], dim=1).tolist()
    ignored = torch.zeros(len(batch), len(logits[0]), dtype=torch.bool)
    total, count = 0.0, 0
    for row, of_image, own, scores, regions in zip(ignored, anchors, labels, logits, regions_of(batch), strict=True):
        for i, (anchor, label, score) in enumerate(zip(of_image.tolist(), own.tolist(), scores, strict=True)):
            if label == 0 and slow_is_inside(anchor, regions):
                row[i] = True
            elif label >= 0:
                total += math.log1p(math.exp(-score if label else score))
                count += 1
    return total / count, ignored, (torch.stack(labels) >= 0) & ~ignored


def test_objectness_ignores_background_anchors_in_regions(thorough):
    batch = crowded()
    expected, ignored, trains = slow_objectness(thorough, batch)
    assert ignored.sum() > 50
    for treatment in ("ignore", "background"):
        with captured(thorough.rpn.head.cls_logits) as levels:
            loss = losses_of(thorough, batch, LossConfig(group_of=treatment))["loss_objectness"]
        assert (loss.item() == pytest.approx(expected, rel=1e-5)) == (treatment == "ignore")
        of_levels = torch.autograd.grad(loss, levels)
        gradient = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in of_levels], dim=1)  # [B, A]
        assert bool((gradient[ignored] != 0).any()) == (treatment == "background")
        assert bool((gradient[trains] != 0).all())


def test_an_object_in_a_region_stays_positive(thorough):
    batch = crowded()
    batch.boxes[GROUPS] = torch.tensor([0.0, 0, 200, 200])  # all over the images, so every object is inside
    targets = targets_of(batch, LossConfig())
    proposals = [torch.cat((t["boxes"] + 1, torch.tensor([[0.0, 0, 9, 9]]))) for t in targets]
    rois = sample_rois(thorough.roi_heads, proposals, targets)
    for labels, target in zip(rois.labels, targets, strict=True):
        # Each object is chosen as itself and as the proposal that is a pixel off.
        assert torch.equal(labels[labels > 0].sort().values, target["labels"].repeat(2).sort().values)
    background = [int((labels == 0).sum()) for labels in rois.labels]
    assert background == [0, 1, 1, 0]  # the box in the corner, in images without a region


def test_no_roi_in_a_region_is_background(thorough):
    batch = crowded()
    generator = torch.Generator().manual_seed(3)
    starts, sizes = (torch.rand((len(batch), 300, 2), generator=generator) for _ in range(2))
    proposals = list(torch.cat((starts * 90, starts * 90 + 4 + sizes * 36), dim=2))
    counts = {}
    for treatment in ("ignore", "background"):
        rois = sample_rois(thorough.roi_heads, proposals, targets_of(batch, LossConfig(group_of=treatment)))
        background = [of_image[labels == 0].tolist() for of_image, labels in zip(rois.boxes, rois.labels, strict=True)]
        assert min(map(len, background)) > 10
        counts[treatment] = sum(
            slow_is_inside(box, regions)
            for of_image, regions in zip(background, regions_of(batch), strict=True)
            for box in of_image
        )
    assert counts["ignore"] == 0
    assert counts["background"] > 100


def test_regions_all_over_every_image_give_zero_losses_that_reach_every_parameter(network):
    one = batch_of(SCENES[1:2])
    covered = replace(one, boxes=torch.tensor([[-1e4, -1e4, 1e4, 1e4]]), flags=one.flags | GROUP_OF)
    losses = losses_of(network, covered)
    assert all(loss.item() == 0 for loss in losses.values())
    assert not any(gradient.any() for gradient in gradients(network, losses).values())


def test_anchors_stay_exact_under_bfloat16(network):
    with captured(network.rpn.anchor_generator) as anchors, torch.autocast("cpu", torch.bfloat16):
        losses = losses_of(network, replace(crowded(), verified=((1, 2),) * 4))
    assert {of_image.dtype for of_image in anchors} == {torch.float32}
    assert all(loss.dtype == torch.float32 and math.isfinite(loss.item()) for loss in losses.values())


# Verified classes


def labels_and_gradients(network: MaskRCNN, batch: Batch, loss: LossConfig) -> list[tuple[Tensor, Tensor]]:
    """For each image the labels of the RoIs that train, and d loss_classifier / d logits, [R, C]."""
    with captured(network.roi_heads.box_predictor) as outputs:
        classifier = losses_of(network, batch, loss)["loss_classifier"]
    [gradient] = torch.autograd.grad(classifier, outputs[:1])
    images, targets = image_list(batch, network), targets_of(batch, loss)
    torch.manual_seed(7)
    proposals, _ = network.rpn(images, network.backbone(images.tensors), targets)
    labels = sample_rois(network.roi_heads, proposals, targets).labels
    return list(zip(labels, gradient.split([len(of_image) for of_image in labels]), strict=True))


def test_background_rois_do_not_lower_the_unverified_classes_of_their_image(network):
    batch = without(BATCH, BATCH.labels == 3)
    unverified = [True, False, True, False]
    partly = replace(batch, verified=((1, 2), None, (1, 2), (1, 2, 3)))
    found = labels_and_gradients(network, partly, LossConfig())
    for taught, loss in ((batch, LossConfig()), (partly, LossConfig(unverified="absent"))):
        plain = labels_and_gradients(network, taught, loss)
        for unknown, (labels, gradient), (same, expected) in zip(unverified, found, plain, strict=True):
            assert torch.equal(labels, same)
            assert (expected[:, 3] > 0).all()  # class 3 is lowered if it is verified, or the treatment is off
            background = labels == 0
            assert (gradient[background, 3] < 0).all() if unknown else torch.allclose(gradient, expected)
            assert torch.allclose(gradient[~background], expected[~background])
