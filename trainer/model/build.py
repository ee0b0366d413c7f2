"""Building torchvision's Mask R-CNN from settings, or from a checkpoint.

The network is torchvision's own class with torchvision's parameter names: its `state_dict` loads with `strict=True`
into the network that torchvision builds from the same settings, with the same detections, and vice versa.
docs/models.md shows how to rebuild it from a checkpoint without this package.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.models.detection.rpn import RPNHead

from shards.common.text import counted
from shards.format.dataset import Category
from trainer.config.settings import DataConfig, ModelConfig
from trainer.model.backbones import STRIDES, Norm, backbone_with_fpn, norm_layer
from trainer.model.checkpoint import STATE_FILE, CheckpointError, State
from trainer.model.shared_mask import SharedMask

BOX_POOL = 7  # side of the box head's RoI features in torchvision
V2_BOX_CONVOLUTIONS = 4


def num_classes(categories: Iterable[Category]) -> int:
    """Return the network's number of classes, including the background, which is class 0."""
    return max(category.id for category in categories) + 1


def build_model(model: ModelConfig, data: DataConfig, num_classes: int) -> MaskRCNN:
    """Build a Mask R-CNN with random weights, all of them trainable.

    `weights.load_weights` loads `model.weights`, `freeze.set_trainable` chooses what trains. Inference resizes to
    `data.min_size` and `data.max_size`. The background is one of the classes.
    """
    norm, head_norm, channels = norm_layer(model.norm, model.norm_eps), None, model.fpn_channels
    if model.version == "v2":
        # Frozen norms need statistics, and weights of a backbone have none for FPN and heads.
        head_norm = norm_layer("group" if model.norm == "group" else "batch", model.norm_eps)
    network = MaskRCNN(
        backbone_with_fpn(model.backbone, norm, channels, head_norm),
        min_size=data.min_size,
        max_size=data.max_size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in model.anchor_sizes), (tuple(model.anchor_ratios),) * len(model.anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=model.rpn_pre_nms[0],
        rpn_pre_nms_top_n_test=model.rpn_pre_nms[1],
        rpn_post_nms_top_n_train=model.rpn_post_nms[0],
        rpn_post_nms_top_n_test=model.rpn_post_nms[1],
        box_predictor=FastRCNNPredictor(model.box_head_features, num_classes),
        box_batch_size_per_image=model.rois_per_image,
        box_positive_fraction=model.positive_fraction,
        box_score_thresh=model.score_threshold,
        box_nms_thresh=model.nms_threshold,
        box_detections_per_img=model.detections_per_image,
        mask_predictor=MaskRCNNPredictor(model.mask_head_channels[-1], model.mask_head_channels[-1], num_classes),
        rpn_head=RPNHead(channels, len(model.anchor_ratios), conv_depth=1 if head_norm is None else 2),
        box_head=_box_head(channels, model.box_head_features, head_norm),
        mask_head=MaskRCNNHeads(channels, model.mask_head_channels, dilation=1, norm_layer=head_norm),
    )
    if model.mask_head == "agnostic":
        network.roi_heads.mask_predictor.mask_fcn_logits = SharedMask(model.mask_head_channels[-1], num_classes)
    _set_pooling_scales(network)
    return network


def rebuild(state: State) -> MaskRCNN:
    """Rebuild a checkpoint's network, in training mode, on the CPU; CheckpointError if its weights do not fit."""
    network = build_model(state.config.model, state.config.data, num_classes(state.categories))
    needed = {name: list(value.shape) for name, value in network.state_dict().items()}
    found = {name: list(value.shape) for name, value in state.weights.items()}
    wrong = [name for name in needed | found if needed.get(name) != found.get(name)]
    if wrong:
        raise CheckpointError(
            f"the checkpoint's weights do not fit its own settings and "
            f"{counted(len(state.categories), 'class', 'classes')}: {wrong[0]} is "
            f"{found.get(wrong[0], 'missing')} and should be {needed.get(wrong[0], 'missing')}: "
            f"was {STATE_FILE} edited?"
        )
    network.load_state_dict(state.weights)
    return network


def _box_head(channels: int, features: int, norm: Norm | None) -> nn.Module:
    """Build the box head of torchvision's first version, or with norms that of v2."""
    head: nn.Module
    if norm is None:
        head = TwoMLPHead(channels * BOX_POOL**2, features)
    else:
        convolutions = [channels] * V2_BOX_CONVOLUTIONS
        head = FastRCNNConvFCHead((channels, BOX_POOL, BOX_POOL), convolutions, [features], norm_layer=norm)
    return head


def _set_pooling_scales(network: MaskRCNN) -> None:
    """Show the RoI pools a square without padding, from which they infer the strides of the feature maps.

    torchvision's pools infer the strides from their first batch, as the height of a map divided by that of the tallest
    image inside the padding, and keep them. If that batch is padded by half or more (landscapes of 1024 x 683 in
    squares of 1024), the strides are permanently wrong by a factor of two.
    """
    side = 8 * STRIDES[-1]
    maps: dict[str, Any] = {
        str(level): torch.zeros(1, 1, side // stride, side // stride) for level, stride in enumerate(STRIDES)
    }
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        pool(maps, [torch.zeros(1, 4)], [(side, side)])
