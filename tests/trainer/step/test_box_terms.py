"""Masks from boxes, against slow versions pixel by pixel."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageCms
from torch import Tensor

from shards.format import rle
from shards.format.sample import Instance, MaskPrediction
from tests.trainer.batches import LOSSES, SCENES, batch_of, gradients, small_network, with_predictions, without_masks
from trainer.config.settings import LossConfig
from trainer.data.affine import warp_instances
from trainer.data.instances import padded, read_instances
from trainer.run.optim import frozen_copy
from trainer.step.box_terms import (
    LIKE,
    BoxInRoi,
    affinity_loss,
    box_in_roi,
    core_loss,
    projection_loss,
    teacher_loss,
    to_lab,
    widen,
)
from trainer.step.ground_truth import ground_truth_of
from trainer.step.roi_align import Rois
from trainer.step.trainable import Trainable, annotated_rois

SIZE = 12
MASKS = LossConfig(unmasked="masks")
BATCH = batch_of(SCENES)
HALF = (torch.arange(BATCH.labels.shape[1]) % 2 == 0).expand_as(BATCH.labels)
PARTLY = without_masks(BATCH, HALF)


def picture(seed: int) -> tuple[Tensor, Tensor, BoxInRoi]:
    """Logits and the box of a mask whose cells are the pixels of an image: float64 [1, S, S], bool [S, S]."""
    rng = np.random.default_rng(seed)
    colours = rng.integers(0, 256, (3, 3, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)  # blocks of one colour
    image = torch.from_numpy(np.clip(colours + rng.integers(-6, 7, colours.shape), 0, 255).astype(np.uint8))
    box = torch.tensor([[2.0, 3.0, 10.0, 9.0]])
    whole = Rois(torch.tensor([[0.0, 0.0, SIZE, SIZE]]), torch.tensor([0]))
    where = box_in_roi(image.permute(2, 0, 1)[None], whole, box, SIZE)
    inside = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    inside[3:9, 2:10] = True
    return torch.from_numpy(rng.normal(size=(1, SIZE, SIZE))), inside, where


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_affinity_of_neighbours_equals_that_of_full_size_masks(seed: int) -> None:
    logits, inside, where = picture(seed)
    probability, colours = logits[0].sigmoid(), where.colours[0]
    found = []
    for y, x in np.ndindex(SIZE, SIZE):
        for v, u in ((y, x + 1), (y + 1, x), (y + 1, x + 1), (y + 1, x - 1)):
            if not (v < SIZE and 0 <= u < SIZE) or not (inside[y, x] or inside[v, u]):
                continue
            if math.dist(colours[:, y, x].tolist(), colours[:, v, u].tolist()) <= LIKE:
                p, q = probability[y, x].item(), probability[v, u].item()
                found.append(-math.log(p * q + (1 - p) * (1 - q)))
    assert 20 < len(found) < 4 * inside.sum()  # some of the pairs are alike
    assert affinity_loss(logits, where).item() == pytest.approx(np.mean(found), rel=1e-6)


def test_the_projection_reaches_all_sides_and_nothing_is_outside() -> None:
    logits, inside, where = picture(0)
    mask = logits[0].sigmoid() * inside
    expected = 0.0
    for axis, side in ((0, inside.any(0)), (1, inside.any(1))):
        projected, wanted = mask.amax(axis), side.double()
        expected += 1 - 2 * float(projected @ wanted) / float(projected @ projected + wanted @ wanted)
    expected -= (1 - logits[0].sigmoid())[~inside].log().mean().item()
    assert projection_loss(logits, where).item() == pytest.approx(expected, rel=1e-6)
    filled = torch.where(inside, 20.0, -20.0)[None]
    assert projection_loss(filled, where).item() == pytest.approx(0, abs=1e-6)
    assert affinity_loss(filled, where).item() > 0.1  # which a filled box alone does not satisfy


def test_the_middle_of_the_box_is_usually_in_the_mask() -> None:
    logits, inside, where = picture(1)
    core = [
        (y, x)
        for y, x in np.ndindex(SIZE, SIZE)
        if inside[y, x] and ((x + 0.5 - 6) / 4) ** 2 + ((y + 0.5 - 6) / 3) ** 2 < 0.75**2
    ]
    probability = logits[0].sigmoid()
    expected = [-0.75 * math.log(p) - 0.25 * math.log(1 - p) for p in (probability[cell].item() for cell in core)]
    assert core_loss(logits, where).item() == pytest.approx(np.mean(expected), rel=1e-6)


def test_a_teacher_teaches_the_cells_in_the_box_of_which_it_is_sure() -> None:
    logits, inside, where = picture(2)
    taught = 1 / (1 + torch.exp(-3 * torch.from_numpy(np.random.default_rng(5).normal(size=(1, SIZE, SIZE)))))
    total, in_mask = 0.0, []
    for y, x in torch.nonzero(inside).tolist():
        p, t = logits[0, y, x].sigmoid().item(), taught[0, y, x].item()
        total -= math.log(p) if t >= 0.7 else math.log(1 - p) if t <= 0.3 else 0
        in_mask += [t] * (t > 0.5)
    expected = np.mean(in_mask) * total / int(inside.sum())
    assert teacher_loss(logits, taught, where).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("term", [projection_loss, affinity_loss, core_loss, "teacher"])
def test_gradients_agree_with_finite_differences(term: object) -> None:
    logits, _, where = picture(3)
    taught = logits.flip(2).sigmoid()
    loss = term if callable(term) else lambda x, where: teacher_loss(x, taught, where)
    assert torch.autograd.gradcheck(lambda x: loss(x, where), logits.requires_grad_())


def test_colours_equal_those_of_littlecms() -> None:
    rgb = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    to_lab8 = ImageCms.buildTransform(ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB"), "RGB", "LAB")
    converted = ImageCms.applyTransform(Image.fromarray(rgb), to_lab8)
    assert converted is not None
    expected = np.array(converted).astype(np.float64)
    expected[..., 0] *= 100 / 255
    expected[..., 1:] = (expected[..., 1:] + 128) % 256 - 128  # a and b are signed bytes
    found = to_lab(torch.from_numpy(rgb).permute(2, 0, 1)[None] / 255)[0].permute(1, 2, 0)
    in_range = (found[..., 1:].abs() < 127).all(-1)
    # The profiles of littleCMS have a white point of D50, to which it adapts.
    assert np.abs(found.numpy() - expected)[in_range].mean() < 2
    grey = to_lab(torch.full((1, 3, 1, 1), 0.5))[0, :, 0, 0]
    assert grey.tolist() == pytest.approx([53.39, 0, 0], abs=0.05)


def test_cells_of_large_objects_are_not_compared() -> None:
    box = torch.tensor([[10.0, 10, 250, 250], [10, 10, 60, 60]])
    image = torch.zeros((1, 3, 300, 300), dtype=torch.uint8)
    where = box_in_roi(image, Rois(widen(box), torch.tensor([0, 0])), box, 28)
    assert where.fine.tolist() == [False, True]
    assert affinity_loss(torch.zeros(2, 28, 28), where).tolist() == pytest.approx([0, math.log(2)])


@pytest.mark.parametrize("rois", ["proposals", "gt"])
def test_fixed_shapes_change_neither_losses_nor_gradients(rois: str) -> None:
    network, found = small_network(), []
    teacher = frozen_copy(network)
    teacher.roi_heads.mask_predictor.mask_fcn_logits.weight.mul_(1000)  # sure of itself
    for fixed_shapes in (False, True):
        step = Trainable(network, MASKS, mask_rois=rois, fixed_shapes=fixed_shapes)
        torch.manual_seed(0)
        losses = step(PARTLY, step.draw_keys(PARTLY), teacher)
        assert set(losses) == LOSSES | {"loss_mask_box", "loss_mask_affinity", "loss_mask_teacher"}
        assert all(loss.item() > 0 for loss in losses.values())
        found.append((losses, gradients(network, losses)))
    (one, of_one), (other, of_other) = found
    for name, loss in one.items():
        assert loss.item() == pytest.approx(other[name].item(), rel=1e-5), name
    for name, gradient in of_one.items():
        assert (gradient - of_other[name]).norm() <= 1e-4 * gradient.norm() + 1e-7, name


def test_with_a_mask_for_every_object_nothing_changes() -> None:
    network, losses = small_network(), []
    for loss in (LossConfig(), MASKS):
        step = Trainable(network, loss)
        torch.manual_seed(0)
        losses.append(step(BATCH, step.draw_keys(BATCH)))
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in LOSSES)
    assert losses[1]["loss_mask_box"].item() == losses[1]["loss_mask_affinity"].item() == 0


@pytest.mark.parametrize("rois", ["proposals", "gt"])
def test_objects_with_a_predicted_mask_of_weight_0_train_masks_from_their_boxes(rois: str) -> None:
    network, losses = small_network(), []
    for batch, predicted in ((with_predictions(BATCH, ~HALF), 0.0), (PARTLY, 1.0)):
        step = Trainable(network, LossConfig(unmasked="masks", predicted=predicted), mask_rois=rois)
        torch.manual_seed(0)
        losses.append(step(batch, step.draw_keys(batch)))
    assert losses[0].keys() == losses[1].keys() > LOSSES
    assert all(torch.equal(losses[0][name], losses[1][name]) for name in losses[0])


@pytest.mark.parametrize("rois", ["proposals", "gt"])
def test_the_box_of_an_object_with_a_predicted_mask_trains_it_as_without(rois: str) -> None:
    network, losses = small_network(), []
    for batch in (with_predictions(BATCH, ~HALF), PARTLY):
        step = Trainable(network, MASKS, mask_rois=rois)
        torch.manual_seed(0)
        losses.append(step(batch, step.draw_keys(batch), network))
    predicted, boxes = losses
    assert all(torch.equal(loss, boxes[name]) for name, loss in predicted.items() if name != "loss_mask")
    assert predicted["loss_mask"].item() != boxes["loss_mask"].item()  # it has the predicted masks as well


def test_boxes_that_an_object_may_not_fill_teach_no_mask() -> None:
    whole = Instance(1, (10.0, 10.0, 40.0, 40.0), None)
    drawing, inside = replace(whole, is_depiction=True), replace(whole, is_inside=True)
    group, masked = replace(whole, is_group_of=True), Instance(1, whole.bbox, rle.encode(np.ones((100, 100))))
    smaller = np.zeros((100, 100), np.uint8)
    smaller[20:40, 20:40] = 1
    predicted = Instance(1, whole.bbox, rle.encode(smaller), prediction=MaskPrediction(0.9, "run"))
    instances = read_instances([whole, predicted, drawing, inside, group, masked])
    both = [True, True, False, False, False, False]
    for found, expected in (
        (instances, both),
        (instances.crop(20, 0, 80, 100), [False] * 6),  # a quarter of the box is cut off
        (instances.crop(12, 0, 80, 100), both),
        (warp_instances(instances, rotation(20), 100, 100), [False] * 6),
        (warp_instances(instances, rotation(0), 100, 100), both),
        (warp_instances(instances, shift(-12), 100, 100), both),
        (warp_instances(instances, shift(-20), 100, 100), [False] * 6),
    ):
        columns: dict[str, Any] = padded([found])
        batch = replace(BATCH, **columns)
        by_box = ground_truth_of(batch, MASKS).by_box
        assert by_box is not None
        assert by_box[0, : len(found)].tolist() == expected
    assert ground_truth_of(batch, LossConfig()).by_box is None
    unturned = warp_instances(instances, rotation(0), 100, 100)
    assert torch.equal(unturned.boxes[:5], instances.boxes[:5])  # not those of the predicted mask


@pytest.mark.parametrize("rois", ["proposals", "gt"])
def test_a_predicted_mask_ends_where_a_crop_cut_its_box(rois: str) -> None:
    whole = np.zeros((100, 100), np.uint8)
    whole[10:50, 10:50] = 1
    one = Instance(1, (10.0, 10.0, 40.0, 40.0), rle.encode(whole), prediction=MaskPrediction(0.9, "run"))
    columns: dict[str, Any] = padded([read_instances([one]).crop(16, 0, 84, 100)])
    batch = replace(BATCH, images=BATCH.images[:1], sizes=BATCH.sizes[:1], **columns)
    step = Trainable(small_network(), MASKS, mask_rois=rois)
    truth = ground_truth_of(batch, MASKS)
    targets, expected, where = step.mask_targets(batch, annotated_rois(truth), 1)
    assert where is not None
    assert targets.rois.boxes[0, 0] < 0  # wider than the box, and the bitmap has cells there
    middle = expected[0, len(expected[0]) // 2]
    assert middle[where.columns[0] > 0.99][:-1].min() > 0.9
    assert expected[0][where.outside[0]].max() == 0


def shift(x: float) -> np.ndarray:
    return np.array([[1, 0, x], [0, 1, 0], [0, 0, 1]], float)


def rotation(degrees: float) -> np.ndarray:
    cosine, sine = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    about_centre = [50 - 50 * cosine + 50 * sine, 50 - 50 * sine - 50 * cosine]
    return np.array([[cosine, -sine, about_centre[0]], [sine, cosine, about_centre[1]], [0, 0, 1]])
