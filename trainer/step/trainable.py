"""A Mask R-CNN as a function from a batch to its losses."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models.detection import MaskRCNN
from torchvision.ops import MultiScaleRoIAlign

from trainer.config.settings import LossConfig
from trainer.data.instances import Batch
from trainer.data.mask_bitmaps import sample_targets
from trainer.step import losses
from trainer.step.box_terms import BoxInRoi, affinity_loss, box_in_roi, inside_box_loss, teacher_loss, widen
from trainer.step.boxes import area, area_inside, encode, take
from trainer.step.ground_truth import GroundTruth, ground_truth_of, verified_at
from trainer.step.host_copy import HostCopy
from trainer.step.matching import IGNORED, match, positive_slots, sample
from trainer.step.proposals import Anchors, Proposals, anchors_of, flatten_levels, proposal_slots, propose
from trainer.step.roi_align import Rois, pool_in_fixed_shapes, pool_on_cpu

Losses = dict[str, Tensor]  # by name; scalars

MASK_SHARES = 8  # the mask branch gets a multiple of this share of its slots
MOST_GRAPHS = 64  # that torch.compile may make of a part
VERSION = 2  # of the random choices: another version draws other RoIs from the same seed


class Keys(NamedTuple):
    """Uniform random numbers in [0, 1) that choose what trains; see `trainer.step.matching`.

    Attributes:
        anchors: float32 [B, A].
        proposals: float32 [B, P + G], of proposals and then of annotated boxes.
    """

    anchors: Tensor
    proposals: Tensor


class RoiTargets(NamedTuple):
    """The RoIs that train the second stage, and what they should predict.

    Attributes:
        rois: K boxes, and the image of each.
        labels: int64 [K], 0 for background.
        objects: int64 [K] the matched row of the image's annotations.
        deltas: float32 [K, 4]; not finite where a RoI is not used.
        is_used: bool [K]; false where an image has fewer RoIs than slots.
        has_mask: bool [K] whether the RoI trains the mask branch with the mask of its object.
        by_box: bool [K] whether it trains the mask branch with the box of its object; None for none at all.
        mask_weight: float32 [K] of the mask of its object in the mask loss; None if all weigh 1.
    """

    rois: Rois
    labels: Tensor
    objects: Tensor
    deltas: Tensor
    is_used: Tensor
    has_mask: Tensor
    by_box: Tensor | None = None
    mask_weight: Tensor | None = None

    @property
    def trains_mask(self) -> Tensor:
        """Whether the RoI trains the mask branch: bool [K]."""
        return self.has_mask if self.by_box is None else self.has_mask | self.by_box

    def first(self, wanted: Tensor, count: int) -> RoiTargets:
        """Return `count` RoIs, those that are wanted, bool [K], before others, else in their order."""
        index = wanted.to(torch.uint8).sort(descending=True, stable=True).indices[:count]
        rois, *others = self
        parts = (None if part is None else part[index] for part in others)
        return RoiTargets(Rois(rois.boxes[index], rois.images[index]), *parts)  # type: ignore[arg-type]


class Trainable(nn.Module):
    """A Mask R-CNN as a function from a batch to its losses, for `accelerate` to wrap.

    For inference call `network`, which is not copied, with a list of float images, as in torchvision. Checkpoints
    contain its `state_dict`. `loss` says how incomplete annotations are treated.

    In fixed shapes, no shape depends on a value on the device, with one exception: the host reads how many RoIs train
    the mask branch, while the device computes the box branch, so that the mask branch runs on few more than these.
    Otherwise both branches run on exactly the RoIs that train them. That is quicker on a CPU, and necessary where a
    batch norm in a head would mix the others into its statistics. `fixed_shapes` chooses; None for the device's form.

    `mask_rois` says which RoIs train the mask branch: positive "proposals", or "gt", the annotated boxes.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        network: MaskRCNN,
        loss: LossConfig | None = None,
        *,
        mask_rois: str = "proposals",
        fixed_shapes: bool | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.loss = loss or LossConfig()
        self.mask_rois = mask_rois
        self.fixed_shapes = fixed_shapes
        self.register_buffer("mean", torch.tensor(network.transform.image_mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(network.transform.image_std).view(3, 1, 1), persistent=False)
        self._is_compiled = False
        self._anchors: dict[tuple[int, int, torch.device], Anchors] = {}

    def forward(self, batch: Batch, keys: Keys | None = None, teacher: MaskRCNN | None = None) -> Losses:
        """Compute loss_objectness, loss_rpn_box_reg, loss_classifier, loss_box_reg and loss_mask, scalars.

        With `loss.unmasked` masks also loss_mask_box and loss_mask_affinity, and with a teacher loss_mask_teacher.

        Every loss depends on every parameter of its head, whatever the batch contains, as DDP requires.

        Args:
            batch: on the network's device.
            keys: the random choices; None to draw them from torch's generator.
            teacher: in evaluation mode, whose masks teach those of objects without one of the source; None for none.
        """
        if self._is_compiled:  # torch imports its compiler for this, which takes seconds
            torch.compiler.cudagraph_mark_step_begin()
        anchors, truth = self.anchors_of(batch), ground_truth_of(batch, self.loss)
        keys = keys or self.draw_keys(batch)
        maps, logits, deltas = self.backbone_stage(batch.images, batch.sizes)
        rois, found = self.proposal_stage(logits, deltas, batch.sizes, anchors, truth, keys)
        masked = rois if self.mask_rois == "proposals" else annotated_rois(truth)
        counts = HostCopy(torch.stack((rois.is_used.sum(), masked.trains_mask.sum())))
        fixed = self.in_fixed_shapes(batch.images.device)
        if fixed:
            found |= self.box_branch(maps, rois, batch.tiles, batch.verified)
            with_mask = counts.read()[1]
            slots = next(slots for slots in self.mask_slots(batch) if slots >= with_mask)
        else:
            used, with_mask = counts.read()
            found |= self.box_branch(maps, rois.first(rois.is_used, max(used, 1)), batch.tiles, batch.verified)
            slots = max(with_mask, 1)
        targets, expected, where = self.mask_targets(batch, masked, slots)
        taught = self.taught_masks(teacher, batch, targets)
        return found | self.mask_branch(maps, targets, expected, where, taught)

    def mask_slots(self, batch: Batch) -> list[int]:
        """Return the numbers of RoIs, ascending, that the mask branch may run on in fixed shapes."""
        images, rows = batch.labels.shape
        of_image = rows if self.mask_rois == "gt" else positive_slots(self.network.roi_heads.fg_bg_sampler)
        most = max(1, images * of_image)
        return sorted({math.ceil(most * share / MASK_SHARES) for share in range(1, MASK_SHARES + 1)})

    def compile_parts(self, **options: Any) -> None:
        """Compile the parts of the step, each as one graph, with options of `torch.compile`, and fix the shapes.

        Per shape of the images there is one graph of `backbone_stage`, `box_branch` and `mask_branch` (two of the last
        where torch convolves few RoIs differently), and one of `proposal_stage` for each number of rows of annotations.
        The branches are not compiled where a batch norm in a head forbids fixed shapes. Earlier graphs are dropped, as
        of another stage, which trains other parameters: torch limits the number of all graphs of a function.
        """
        torch._dynamo.reset()
        self.fixed_shapes = self._is_compiled = True
        torch._dynamo.config.cache_size_limit = max(torch._dynamo.config.cache_size_limit, MOST_GRAPHS)
        names = ["backbone_stage", "proposal_stage"]
        if self.in_fixed_shapes(self.mean.device):
            names += ["box_branch", "mask_branch"]
        for name in names:
            setattr(self, name, torch.compile(getattr(self, name), fullgraph=True, dynamic=False, **options))

    def anchors_of(self, batch: Batch) -> Anchors:
        """Return the anchors of a batch's input shape, which are computed once per shape."""
        height, width = batch.images.shape[-2:]
        key = (height, width, batch.images.device)
        if key not in self._anchors:
            self._anchors[key] = anchors_of(self.network.rpn.anchor_generator, *key)
        return self._anchors[key]

    def draw_keys(self, batch: Batch) -> Keys:
        """Draw random keys for a batch from torch's generator of its device."""
        anchors, (images, objects) = self.anchors_of(batch), batch.labels.shape
        proposals = proposal_slots(self.network.rpn, anchors) + objects
        device = batch.images.device
        return Keys(
            torch.rand((images, len(anchors.boxes)), device=device), torch.rand((images, proposals), device=device)
        )

    def in_fixed_shapes(self, device: torch.device) -> bool:
        """Return whether the step on a device computes in fixed shapes."""
        heads = (self.network.roi_heads.box_head, self.network.roi_heads.mask_head)
        if any(isinstance(module, _BatchNorm) and module.training for head in heads for module in head.modules()):
            return False
        return device.type != "cpu" if self.fixed_shapes is None else self.fixed_shapes

    def backbone_stage(self, images: Tensor, sizes: Tensor) -> tuple[list[Tensor], Tensor, Tensor]:
        """Run backbone and RPN head on images, uint8 [B, 3, H, W], of these sizes, int64 [B, 2].

        Returns:
            The maps that RoIs are read from, [B, C, h, w] of each level; float32 [B, A] logits; [B, A, 4] deltas.
        """
        maps = list(self.network.backbone(self.network_input(images, sizes)).values())
        logits, deltas = flatten_levels(*self.network.rpn.head(maps))
        return maps[: len(self.network.roi_heads.box_roi_pool.featmap_names)], logits, deltas

    def proposal_stage(
        self, logits: Tensor, deltas: Tensor, sizes: Tensor, anchors: Anchors, truth: GroundTruth, keys: Keys
    ) -> tuple[RoiTargets, Losses]:
        """Choose the RoIs of the second stage, B x R, and return them with loss_objectness and loss_rpn_box_reg."""
        rpn = self.network.rpn
        with torch.no_grad():
            proposals = propose(rpn, anchors, logits, deltas, sizes)
            rois = self.choose_rois(proposals, truth, keys.proposals)
            matches = match(rpn.proposal_matcher, truth, anchors.boxes[None], area_inside(anchors.boxes[None], sizes))
            chosen = sample(rpn.fg_bg_sampler, matches.role, keys.anchors)  # [B, S]
            most = positive_slots(rpn.fg_bg_sampler)
            index, is_positive = chosen.entries[:, :most], chosen.is_positive[:, :most]  # [B, P]
            own = take(truth.boxes, take(matches.objects, index))
            targets = encode(rpn.box_coder, own, anchors.boxes[index])  # [B, P, 4]
        return rois, {
            "loss_objectness": losses.objectness_loss(take(logits, chosen.entries), chosen.is_positive, chosen.is_used),
            "loss_rpn_box_reg": losses.box_loss(take(deltas, index), targets, is_positive, chosen.is_used),
        }

    def network_input(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Normalise images, uint8 [B, 3, H, W], with zeros in the padding, in the memory format of the network.

        As in torchvision, which pads after it normalises: the padding is the mean colour, not black.
        """
        weight = next(parameter for parameter in self.network.backbone.parameters() if parameter.dim() == 4)
        channels_last = not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last)
        images = images.contiguous(memory_format=torch.channels_last if channels_last else torch.contiguous_format)
        rows, columns = (torch.arange(side, device=images.device) for side in images.shape[-2:])
        inside = (rows[:, None] < sizes[:, :1, None]) & (columns < sizes[:, 1:, None])  # [B, H, W]
        return ((images.float() / 255 - self.mean) / self.std).masked_fill(~inside[:, None], 0)

    def choose_rois(self, proposals: Proposals, truth: GroundTruth, keys: Tensor) -> RoiTargets:
        """Choose RoIs among proposals and annotated boxes as `RoIHeads.select_training_samples`.

        `keys` are float32 [B, P + G]. Background in regions is ignored.
        """
        heads = self.network.roi_heads
        boxes = torch.cat((proposals.boxes, truth.boxes), dim=1)  # [B, P + G, 4]
        valid = torch.cat((proposals.valid, truth.is_object), dim=1)
        # Proposals and annotated boxes are clipped to their images, anchors are not.
        matches = match(heads.proposal_matcher, truth, boxes, area(boxes))
        chosen = sample(heads.fg_bg_sampler, matches.role.masked_fill(~valid, IGNORED), keys)  # [B, R]
        rois, objects = take(boxes, chosen.entries), take(matches.objects, chosen.entries)
        labels = take(truth.labels, objects).masked_fill(~chosen.is_positive, 0)
        deltas = encode(heads.box_coder, take(truth.boxes, objects), rois)
        images = torch.arange(len(rois), device=rois.device)[:, None].expand_as(labels)
        has_mask = chosen.is_positive & take(truth.has_mask, objects)
        by_box = None if truth.by_box is None else chosen.is_positive & take(truth.by_box, objects)
        mask_weight = None if truth.mask_weight is None else take(truth.mask_weight, objects)
        parts = [part.flatten(0, 1) for part in (labels, objects, deltas, chosen.is_used, has_mask)]
        found = RoiTargets(Rois(rois.flatten(0, 1), images.flatten()), *parts)
        return found._replace(by_box=flat(by_box), mask_weight=flat(mask_weight))

    def box_branch(self, maps: list[Tensor], targets: RoiTargets, tiles: Tensor, verified: Tensor) -> Losses:
        """Return loss_classifier and loss_box_reg; `tiles` and `verified` are those of a `Batch`."""
        heads = self.network.roi_heads
        logits, deltas = heads.box_predictor(heads.box_head(self.pool(heads.box_roi_pool, maps, targets.rois)))
        logits = logits.float()  # [K, C]
        if self.loss.unverified == "ignore":
            logits = losses.merge_unverified(logits, targets.labels, verified_at(*targets.rois, tiles, verified))
        own = losses.of_label(deltas.float().unflatten(1, (-1, 4)), targets.labels)  # [K, 4]
        return {
            "loss_classifier": losses.class_loss(logits, targets.labels, targets.is_used),
            "loss_box_reg": losses.box_loss(own, targets.deltas, targets.labels > 0, targets.is_used),
        }

    def mask_branch(
        self,
        maps: list[Tensor],
        targets: RoiTargets,
        expected: Tensor,
        where: BoxInRoi | None = None,
        taught: Tensor | None = None,
    ) -> Losses:
        """Return loss_mask of the RoIs with a mask, and with `where` the losses of those that train with a box.

        `expected` and `where` are those of `mask_targets`, `taught` that of `taught_masks`.
        """
        logits = self.mask_logits(self.network, maps, targets.rois)
        found = {"loss_mask": losses.mask_loss(logits, targets.labels, expected, targets.has_mask, targets.mask_weight)}
        if where is not None:
            assert targets.by_box is not None
            own = losses.of_label(logits, targets.labels)
            found["loss_mask_box"] = losses.mean_of(inside_box_loss(own, where), targets.by_box)
            found["loss_mask_affinity"] = losses.mean_of(affinity_loss(own, where), targets.by_box)
            if taught is not None:
                found["loss_mask_teacher"] = losses.mean_of(teacher_loss(own, taught, where), targets.by_box)
        return found

    def mask_logits(self, network: MaskRCNN, maps: list[Tensor], rois: Rois) -> Tensor:
        """Return the masks of all classes that a network predicts in RoIs on its maps: float32 [K, C, S, S]."""
        heads = network.roi_heads
        logits: Tensor = heads.mask_predictor(heads.mask_head(self.pool(heads.mask_roi_pool, maps, rois)))
        return logits.float()

    @torch.no_grad()
    def taught_masks(self, teacher: MaskRCNN | None, batch: Batch, targets: RoiTargets) -> Tensor | None:
        """Return the probabilities of a teacher's masks in RoIs, for their classes: float32 [K, S, S].

        None without a teacher, or if boxes train no masks.
        """
        if teacher is None or targets.by_box is None:
            return None
        maps = list(teacher.backbone(self.network_input(batch.images, batch.sizes)).values())
        maps = maps[: len(teacher.roi_heads.mask_roi_pool.featmap_names)]
        taught = losses.of_label(self.mask_logits(teacher, maps, targets.rois), targets.labels).sigmoid()
        self.allow_any_number(taught)
        return taught

    def mask_targets(self, batch: Batch, rois: RoiTargets, slots: int) -> tuple[RoiTargets, Tensor, BoxInRoi | None]:
        """Return `slots` RoIs, those that train the mask branch first, and what they should predict.

        That is masks, float32 [slots, S, S], 0 to 1, or any values where `has_mask` is false; and with `loss.unmasked`
        masks where the boxes of their objects are. RoIs that train with the box of their object are wider, and their
        masks end at the box, which a crop of the image may have cut.
        """
        chosen = rois.first(rois.trains_mask, slots)
        row = chosen.rois.images * batch.bitmaps.shape[1] + chosen.objects
        size = 2 * self.network.roi_heads.mask_roi_pool.output_size[0]  # the mask head doubles what it is given
        where = None
        if chosen.by_box is not None:
            boxes = torch.where(chosen.by_box[:, None], widen(chosen.rois.boxes), chosen.rois.boxes)
            chosen = chosen._replace(rois=Rois(boxes, chosen.rois.images))
            where = box_in_roi(batch.images, chosen.rois, batch.boxes.flatten(0, 1)[row], size)
        bitmaps, frames = batch.bitmaps.flatten(0, 1), batch.frames.flatten(0, 1)
        expected = sample_targets(bitmaps, frames, row, chosen.rois.boxes, size)
        if where is not None and chosen.by_box is not None:
            expected = expected.masked_fill(where.outside & chosen.by_box[:, None, None], 0)
        self.allow_any_number(*chosen.rois, *chosen[1:], expected, *(where or ()))
        return chosen, expected, where

    def allow_any_number(self, *parts: Tensor | None) -> None:
        """Make one compiled graph serve any number of RoIs, the first dimension of each part."""
        for part in parts if self._is_compiled else ():
            if part is not None:
                torch._dynamo.maybe_mark_dynamic(part, 0)

    def pool(self, pooler: MultiScaleRoIAlign, maps: list[Tensor], rois: Rois) -> Tensor:
        """Read RoIs from the maps in the form of the device: [K, C, S, S]."""
        device = rois.boxes.device
        by_roi = device.type == "cpu" and not self.in_fixed_shapes(device)
        return pool_on_cpu(pooler, maps, rois) if by_roi else pool_in_fixed_shapes(pooler, maps, rois)


def annotated_rois(truth: GroundTruth) -> RoiTargets:
    """Return the annotated boxes of a batch as RoIs of the mask branch, B x G; `deltas` are 0."""
    images, rows = truth.labels.shape
    image, row = (torch.arange(count, device=truth.labels.device) for count in (images, rows))
    rois = Rois(truth.boxes.flatten(0, 1), image[:, None].expand(images, rows).flatten())
    has_mask = truth.is_object & truth.has_mask
    parts = (truth.labels, row.expand(images, rows), torch.zeros_like(truth.boxes), truth.is_object, has_mask)
    found = RoiTargets(rois, *[part.flatten(0, 1) for part in parts])
    return found._replace(by_box=flat(truth.by_box), mask_weight=flat(truth.mask_weight))


def flat(part: Tensor | None) -> Tensor | None:
    """Join images and rows: [B, G, ...] is [B x G, ...]."""
    return None if part is None else part.flatten(0, 1)
