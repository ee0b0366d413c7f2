"""What incomplete annotations teach and withhold: the arithmetic against slow loops, the gradients in a network."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler
from torchvision.models.detection.roi_heads import fastrcnn_loss

from tests.trainer.batches import CLASSES, LOSSES, SCENES, batch_of, gradients, our_losses, small_network, without_masks
from trainer.config.settings import LossConfig
from trainer.data.instances import GROUP_OF, IGNORED, Batch
from trainer.model.losses import image_list, sample_rois, targets_of
from trainer.model.partial_labels import join_unverified, leave_out, lie_in, verified_table

COLUMNS = ("boxes", "labels", "flags", "bitmaps", "frames")
EVERYTHING = 10**6  # a sampler of so many leaves nothing to chance


@pytest.fixture(scope="module")
def network() -> MaskRCNN:
    return small_network()


@pytest.fixture(scope="module")
def thorough(network: MaskRCNN) -> MaskRCNN:
    """The same network, trained on every anchor and every proposal, with objectness that differs between anchors."""
    copied = copy.deepcopy(network)
    copied.rpn.head.cls_logits.weight.data *= 300
    copied.rpn.fg_bg_sampler = BalancedPositiveNegativeSampler(EVERYTHING, 0.5)
    copied.roi_heads.fg_bg_sampler = BalancedPositiveNegativeSampler(EVERYTHING, 0.5)
    return copied


def without(batch: Batch, gone: Tensor) -> Batch:
    """The batch but for the instances `gone`."""
    counts = torch.stack([(~part).sum() for part in gone.split(batch.counts.tolist())])
    return replace(batch, counts=counts, **{name: getattr(batch, name)[~gone] for name in COLUMNS})


def flagged(batch: Batch, which: list[int], flag: int) -> Batch:
    flags = batch.flags.clone()
    flags[which] |= flag
    return replace(batch, flags=flags)


def chosen(batch: Batch, which: list[int]) -> Tensor:
    mask = torch.zeros(len(batch.labels), dtype=torch.bool)
    mask[which] = True
    return mask


def slow_lies_in(box: list[float], regions: list[list[float]]) -> bool:
    area = (box[2] - box[0]) * (box[3] - box[1])
    for region in regions:
        across = min(box[2], region[2]) - max(box[0], region[0])
        down = min(box[3], region[3]) - max(box[1], region[1])
        if across > 0 and down > 0 and across * down / area >= 0.5:
            return True
    return False


# Whole pixels, so that loops and tensors compute the very same numbers, the share of exactly one half among them.
corner, side = st.integers(-20, 40), st.integers(1, 40)
boxes = st.tuples(corner, corner, side, side).map(lambda b: [float(v) for v in (b[0], b[1], b[0] + b[2], b[1] + b[3])])


@given(st.lists(boxes, min_size=1, max_size=12), st.lists(boxes, max_size=40))
def test_lying_in_a_region_is_what_a_loop_says(some, regions):
    found = lie_in(torch.tensor(some), torch.tensor(regions).reshape(-1, 4))
    assert found.tolist() == [slow_lies_in(box, regions) for box in some]


def test_half_of_the_own_area_counts_not_iou():
    region = torch.tensor([[0.0, 0, 100, 100]])
    inside = torch.tensor([[10.0, 10, 20, 20], [95.0, 0, 105, 10], [95.1, 0, 105.1, 10], [0.0, 0, 300, 300]])
    assert lie_in(inside, region).tolist() == [True, True, False, False]


def test_only_background_is_left_out():
    region, within = torch.tensor([[0.0, 0, 100, 100]]), torch.tensor([[10.0, 10, 20, 20]]).repeat(4, 1)
    for kind in (torch.float32, torch.int64):
        labels = torch.tensor([0, 1, -1, 0], dtype=kind)
        outside = torch.cat((within[:3], within[3:] + 200))
        assert leave_out(labels, outside, region).tolist() == [-1, 1, -1, 0]
        assert leave_out(labels, outside, region).dtype == kind
        assert leave_out(labels, outside, region[:0]) is labels
        assert labels.tolist() == [0, 1, -1, 0]


def test_table_of_verified_classes():
    table = verified_table([(1, 3), None, (2,)], 4)
    assert table is not None
    assert table.int().tolist() == [[1, 1, 0, 1], [1, 1, 1, 1], [1, 0, 1, 0]]
    assert verified_table([None, None], 4) is None
    assert verified_table([None, (1, 2, 3)], 4) is None


# Boxes without masks


def test_a_box_without_a_mask_gives_gradients_to_classes_and_boxes_and_none_to_masks(network):
    batch = batch_of(SCENES)
    nothing = without_masks(batch, torch.zeros(len(batch.labels), dtype=torch.bool))
    reached = gradients(network, our_losses(network, nothing))
    for name, gradient in reached.items():
        if "roi_heads.mask" in name:
            assert float(gradient.abs().sum()) == 0, name
    for name in ("cls_score", "bbox_pred"):
        assert float(reached[f"roi_heads.box_predictor.{name}.weight"].abs().sum()) > 0


def test_switched_off_an_object_without_a_mask_is_background(network):
    batch, off = batch_of(SCENES), LossConfig(unmasked="background")
    keep = torch.tensor([True, False] * 6)[: len(batch.labels)]
    partly = without_masks(batch, keep)
    expected, actual = our_losses(network, without(batch, ~keep)), our_losses(network, partly, off)
    assert all(torch.equal(expected[name], actual[name]) for name in LOSSES)
    assert not torch.equal(actual["loss_classifier"], our_losses(network, partly)["loss_classifier"])


# Group-of regions

GROUPS = [0, 5]  # one among others, and one over the middle of an image


def crowded() -> Batch:
    """Two of the objects stand for crowds, each over a good part of its image."""
    batch = batch_of(SCENES)
    places = batch.boxes.clone()
    places[GROUPS] = torch.tensor([[8.0, 8, 120, 90], [20.0, 4, 100, 120]])
    return flagged(replace(batch, boxes=places), GROUPS, GROUP_OF)


def regions_of(batch: Batch) -> list[list[list[float]]]:
    groups = (batch.flags & (GROUP_OF | IGNORED)) != 0
    counts = batch.counts.tolist()
    return [b[g].tolist() for b, g in zip(batch.boxes.split(counts), groups.split(counts), strict=True)]


@contextmanager
def caught(module: torch.nn.Module) -> Iterator[list[Tensor]]:
    """What a module answers in this context, call after call; after a backward pass with gradients."""
    answers: list[Tensor] = []

    def keep(_module: torch.nn.Module, _inputs: object, outputs: Tensor | tuple[Tensor, ...] | list[Tensor]) -> None:
        answers.extend([outputs] if isinstance(outputs, Tensor) else outputs)

    handle = module.register_forward_hook(keep)
    try:
        yield answers
    finally:
        handle.remove()


def pulls(loss: Tensor, answers: list[Tensor]) -> list[Tensor]:
    """Gradients of a loss with respect to what was caught."""
    return list(torch.autograd.grad(loss, answers))


def anchor_targets(network: MaskRCNN, batch: Batch, loss: LossConfig) -> tuple[list[Tensor], list[Tensor]]:
    """torchvision's anchors and labels, which know nothing of regions."""
    images = image_list(batch, network)
    features = list(network.backbone(images.tensors).values())
    anchors = network.rpn.anchor_generator(images, features)
    return anchors, network.rpn.assign_targets_to_anchors(anchors, targets_of(batch, loss))[0]


def slow_objectness(network: MaskRCNN, batch: Batch, loss: LossConfig) -> tuple[float, list[list[bool]]]:
    """The loss over all anchors but those in regions, one by one, and which anchors these are."""
    anchors, labels = anchor_targets(network, batch, loss)
    images = image_list(batch, network)
    with caught(network.rpn.head.cls_logits) as maps:
        network.rpn.head(list(network.backbone(images.tensors).values()))
    logits = torch.cat([m.permute(0, 2, 3, 1).flatten(1) for m in maps], dim=1).tolist()
    total, count, left_out = 0.0, 0, []
    for of_image, own, scores, regions in zip(anchors, labels, logits, regions_of(batch), strict=True):
        left_out.append([False] * len(own))
        for i, (anchor, label, score) in enumerate(zip(of_image.tolist(), own.tolist(), scores, strict=True)):
            if label == 0 and slow_lies_in(anchor, regions):
                left_out[-1][i] = True
            elif label >= 0:
                total += math.log1p(math.exp(-score if label else score))
                count += 1
    return total / count, left_out


def test_objectness_is_a_slow_loops_over_all_anchors(thorough):
    batch = crowded()
    with torch.no_grad():
        expected, left_out = slow_objectness(thorough, batch, LossConfig())
        plain, _ = slow_objectness(thorough, without(batch, chosen(batch, GROUPS)), LossConfig())
    assert sum(map(sum, left_out)) > 50
    actual = our_losses(thorough, batch)["loss_objectness"].item()
    assert actual == pytest.approx(expected, rel=1e-5)
    assert abs(plain - expected) > 1e-4 * plain


@pytest.mark.parametrize("treatment", ["ignore", "background"])
def test_anchors_in_a_region_get_no_gradient(thorough, treatment):
    batch, loss = crowded(), LossConfig(group_of=treatment)
    with torch.no_grad():
        _, left_out = slow_objectness(thorough, batch, LossConfig())
    with caught(thorough.rpn.head.cls_logits) as levels:
        objectness = our_losses(thorough, batch, loss)["loss_objectness"]
    gradients_of = [level.permute(0, 2, 3, 1).flatten(1) for level in pulls(objectness, levels)]
    given_to = torch.cat(gradients_of, dim=1) != 0
    in_regions = torch.tensor(left_out)
    assert bool(given_to[in_regions].any()) == (treatment == "background")
    _, labels = anchor_targets(thorough, batch, loss)
    taught = (torch.stack(labels) >= 0) & ~in_regions
    assert bool(given_to[taught].all())


def test_an_object_in_a_region_stays_positive(thorough):
    batch = crowded()
    whole = replace(batch, boxes=batch.boxes.clone())
    whole.boxes[GROUPS] = torch.tensor([0.0, 0, 200, 200])  # now every object of those images lies in a region
    targets = targets_of(whole, LossConfig())
    proposals = [torch.cat((t["boxes"] + 1, torch.tensor([[0.0, 0, 9, 9]]))) for t in targets]
    rois = sample_rois(thorough.roi_heads, proposals, targets)
    for labels, target in zip(rois.labels, targets, strict=True):
        # Each object is there as itself and as the proposal a pixel beside it.
        assert torch.equal(labels[labels > 0].sort().values, target["labels"].repeat(2).sort().values)
    background = [int((labels == 0).sum()) for labels in rois.labels]
    assert background == [0, 1, 1, 0]  # the box in the corner, where there is no region


def test_no_roi_in_a_region_is_background(thorough):
    batch = crowded()
    generator = torch.Generator().manual_seed(3)
    starts = torch.rand((len(batch), 300, 2), generator=generator) * 90
    proposals = list(
        torch.cat((starts, starts + 4 + torch.rand((len(batch), 300, 2), generator=generator) * 36), dim=2)
    )
    counts = {}
    for treatment in ("ignore", "background"):
        rois = sample_rois(thorough.roi_heads, proposals, targets_of(batch, LossConfig(group_of=treatment)))
        counts[treatment] = sum(
            slow_lies_in(box, regions)
            for of_image, labels, regions in zip(rois.boxes, rois.labels, regions_of(batch), strict=True)
            for box in of_image[labels == 0].tolist()
        )
        outside = [int((labels == 0).sum()) for labels in rois.labels]
        assert min(outside) > 10
    assert counts["ignore"] == 0
    assert counts["background"] > 100


def test_switched_off_a_region_is_background_or_an_object(network):
    batch = crowded()
    gone = our_losses(network, without(batch, chosen(batch, GROUPS)))
    off = our_losses(network, batch, LossConfig(group_of="background"))
    assert all(torch.equal(gone[name], off[name]) for name in LOSSES)
    plain = replace(batch, flags=batch.flags & ~GROUP_OF)
    expected, actual = our_losses(network, plain), our_losses(network, batch, LossConfig(group_of="object"))
    assert all(torch.equal(expected[name], actual[name]) for name in LOSSES)


@pytest.mark.parametrize("treatment", ["ignore", "object", "background"])
def test_what_is_beyond_the_cap_is_a_region_whatever_groups_are(network, treatment):
    batch = crowded()
    beyond = replace(batch, flags=torch.where(chosen(batch, GROUPS), torch.tensor(IGNORED), batch.flags).byte())
    expected, actual = our_losses(network, batch), our_losses(network, beyond, LossConfig(group_of=treatment))
    assert all(torch.equal(expected[name], actual[name]) for name in LOSSES)


def test_regions_all_over_every_image_teach_nothing(network):
    one = batch_of(SCENES[1:2])
    everywhere = replace(flagged(one, [0], GROUP_OF), boxes=torch.tensor([[-1e4, -1e4, 1e4, 1e4]]))
    losses = our_losses(network, everywhere)
    assert all(loss.item() == 0 for loss in losses.values())
    reached = gradients(network, losses)
    assert [name for name, gradient in reached.items() if gradient is None] == []
    assert all(float(gradient.abs().sum()) == 0 for gradient in reached.values())


# Verified classes


@given(st.data())
def test_joined_logits_are_a_slow_softmax(data):
    rows = data.draw(st.lists(st.integers(0, 6), min_size=1, max_size=4))
    verified = [data.draw(st.none() | st.lists(st.integers(1, 4), unique=True).map(tuple)) for _ in rows]
    labels = [
        torch.tensor(data.draw(st.lists(st.integers(0, 4), min_size=n, max_size=n)), dtype=torch.int64) for n in rows
    ]
    table = verified_table(verified, 5)
    if table is None or not sum(rows):
        return
    logits = torch.randn((sum(rows), 5), generator=torch.Generator().manual_seed(sum(rows)), requires_grad=True)
    joined = join_unverified(logits, labels, table)
    boxes = torch.zeros(sum(rows), 20)
    loss, _ = fastrcnn_loss(joined, boxes, labels, [torch.zeros(n, 4) for n in rows])
    loss.backward()
    total, images = 0.0, [i for i, n in enumerate(rows) for _ in range(n)]
    for row, image, label in zip(range(sum(rows)), images, torch.cat(labels).tolist(), strict=True):
        known = verified[image]
        unverified = [] if known is None else [c for c in range(1, 5) if c not in known]
        right = [0, *unverified] if label == 0 else [label]
        exponentials = [math.exp(value) for value in logits[row].tolist()]
        total -= math.log(sum(exponentials[c] for c in right) / sum(exponentials))
        for c in range(5):  # what may be right is pulled up, unless anything may be; all else is pulled down
            pull = logits.grad[row, c].item()
            assert (pull < 1e-7) if c in right else (pull > 0)
    assert loss.item() == pytest.approx(total / sum(rows), rel=1e-5, abs=1e-6)


def class_gradient(network: MaskRCNN, batch: Batch, loss: LossConfig) -> Tensor:
    """float [C] how much the classifier's loss pulls at each class's row."""
    reached = gradients(network, {"loss_classifier": our_losses(network, batch, loss)["loss_classifier"]})
    gradient = reached["roi_heads.box_predictor.cls_score.weight"]
    return gradient.abs().sum(dim=1)


def rois_and_pulls(network: MaskRCNN, batch: Batch, loss: LossConfig) -> tuple[list[Tensor], list[Tensor]]:
    """Of each image the labels of the RoIs that train, and d loss_classifier / d logits, [R, C]."""
    with caught(network.roi_heads.box_predictor) as answers:
        taught = our_losses(network, batch, loss)["loss_classifier"]
    pulled = pulls(taught, answers[:1])[0]
    targets = targets_of(batch, loss)
    torch.manual_seed(7)
    proposals, _ = network.rpn(
        image_list(batch, network), network.backbone(image_list(batch, network).tensors), targets
    )
    labels = sample_rois(network.roi_heads, proposals, targets).labels
    return labels, list(pulled.split([len(of_image) for of_image in labels]))


def test_where_nothing_is_drawn_an_unverified_class_is_not_pulled_down(network):
    batch = without(batch_of(SCENES), batch_of(SCENES).labels == 3)
    assert set(batch.labels.tolist()) == {1, 2}
    unknown, absent = (replace(batch, verified=(known,) * len(batch)) for known in ((1, 2), (1, 2, 3)))
    labels, unverified = rois_and_pulls(network, unknown, LossConfig())
    for taught, switched in ((absent, LossConfig()), (unknown, LossConfig(unverified="absent"))):
        same, known = rois_and_pulls(network, taught, switched)
        for own, others, pull, plain in zip(labels, same, unverified, known, strict=True):
            assert torch.equal(own, others)
            assert (plain[:, 3] > 0).all()  # absent, where people looked for it or the treatment is off
            assert (pull[own == 0, 3] < 0).all()
            assert torch.allclose(pull[own > 0], plain[own > 0])  # a drawn object is no other class's


def test_verification_is_of_each_image(network):
    batch = without(batch_of(SCENES), batch_of(SCENES).labels == 3)
    unknown = replace(batch, verified=((1, 2), None, (1, 2), (1, 2, 3)))
    labels, parts = rois_and_pulls(network, unknown, LossConfig())
    down = [bool((pull[own == 0, 3] > 0).all()) for own, pull in zip(labels, parts, strict=True)]
    assert down == [False, True, False, True]
    assert all(bool((pull[own == 0, 3] < 0).all()) for own, pull in zip(labels[::2], parts[::2], strict=True))


def test_a_pasted_object_teaches_its_class_where_it_is_not_verified(network):
    batch = replace(batch_of(SCENES), verified=((), (), (), ()))
    losses = our_losses(network, batch)
    assert math.isfinite(losses["loss_classifier"].item())
    assert (class_gradient(network, batch, LossConfig())[batch.labels.unique()] > 0).all()


@pytest.mark.parametrize(
    ("verified", "loss"),
    [(((1, 2, 3),) * 4, LossConfig()), (((), (1,), None, (2, 3)), LossConfig(unverified="absent"))],
)
def test_all_verified_or_switched_off_is_the_plain_loss_to_the_bit(network, verified, loss):
    batch = batch_of(SCENES)
    plain, actual = our_losses(network, batch), our_losses(network, replace(batch, verified=verified), loss)
    assert all(torch.equal(plain[name], actual[name]) for name in LOSSES)
    assert CLASSES == 4


def test_anchors_stay_exact_under_bfloat16(network):
    with caught(network.rpn.anchor_generator) as anchors, torch.autocast("cpu", torch.bfloat16):
        losses = our_losses(network, replace(crowded(), verified=((1, 2),) * 4))
    assert {of_image.dtype for of_image in anchors} == {torch.float32}
    assert all(loss.dtype == torch.float32 and math.isfinite(loss.item()) for loss in losses.values())
