"""Building torchvision's Mask R-CNN from settings.

The network is torchvision's own class with torchvision's own names: its `state_dict` loads with `strict=True` into the
network that torchvision builds from the same settings and gives the same detections, and the other way round.
docs/models.md shows how to rebuild it from a checkpoint without this package.
"""

from __future__ import annotations

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

BOX_POOL = 7  # torchvision's side of the box head's RoI features
V2_BOX_CONVOLUTIONS = 4


def num_classes(categories: Iterable[Category]) -> int:
    """The network's number of classes: ids count from 1, the background is 0."""
    return max(category.id for category in categories) + 1


def build_model(model: ModelConfig, data: DataConfig, num_classes: int) -> MaskRCNN:
    """torchvision's Mask R-CNN with a ResNet or MobileNet under an FPN; random weights, all of which train.

    `weights.load_weights` gives it weights, `freeze.set_trainable` decides what trains.

    Args:
        model: the settings; `weights` is not looked at.
        data: `min_size` and `max_size` are the sizes that inference resizes to.
        num_classes: classes and the background.
    """
    norm = norm_layer(model.norm, model.norm_eps)
    # Frozen norms need statistics, which no weights of a backbone have for FPN and heads.
    head_norm = norm_layer("group" if model.norm == "group" else "batch", model.norm_eps)
    network = MaskRCNN(
        backbone_with_fpn(model.backbone, norm, model.fpn_channels, head_norm if model.version == "v2" else None),
        min_size=data.min_size,
        max_size=data.max_size,
        rpn_anchor_generator=AnchorGenerator(
            tuple((size,) for size in model.anchor_sizes),
            (tuple(model.anchor_ratios),) * len(model.anchor_sizes),
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
        **(_v2_heads(model, head_norm) if model.version == "v2" else _v1_heads(model)),
    )
    _fix_pooling_scales(network)
    return network


def rebuild(state: State) -> MaskRCNN:
    """The network of a checkpoint, with its weights; in training mode, on the CPU.

    Raises:
        CheckpointError: the weights are not those of a network with these settings and classes.
    """
    network = build_model(state.config.model, state.config.data, num_classes(state.categories))
    needed = {name: value.shape for name, value in network.state_dict().items()}
    given = {name: value.shape for name, value in state.weights.items()}
    wrong = [name for name in needed | given if needed.get(name) != given.get(name)]
    if wrong:
        raise CheckpointError(
            f"the checkpoint's weights do not fit its own settings and "
            f"{counted(len(state.categories), 'class', 'classes')}: {wrong[0]} is "
            f"{_shape(given, wrong[0])} and should be {_shape(needed, wrong[0])}: has {STATE_FILE} been changed?"
        )
    network.load_state_dict(state.weights)
    return network


def _shape(shapes: dict[str, torch.Size], name: str) -> str:
    return str(list(shapes[name])) if name in shapes else "missing"


def _v1_heads(model: ModelConfig) -> dict[str, nn.Module]:
    return {
        "rpn_head": RPNHead(model.fpn_channels, len(model.anchor_ratios)),
        "box_head": TwoMLPHead(model.fpn_channels * BOX_POOL**2, model.box_head_features),
        "mask_head": MaskRCNNHeads(model.fpn_channels, model.mask_head_channels, dilation=1),
    }


def _v2_heads(model: ModelConfig, norm: Norm) -> dict[str, nn.Module]:
    """As `maskrcnn_resnet50_fpn_v2` builds them."""
    return {
        "rpn_head": RPNHead(model.fpn_channels, len(model.anchor_ratios), conv_depth=2),
        "box_head": FastRCNNConvFCHead(
            (model.fpn_channels, BOX_POOL, BOX_POOL),
            [model.fpn_channels] * V2_BOX_CONVOLUTIONS,
            [model.box_head_features],
            norm_layer=norm,
        ),
        "mask_head": MaskRCNNHeads(model.fpn_channels, model.mask_head_channels, dilation=1, norm_layer=norm),
    }


def _fix_pooling_scales(network: MaskRCNN) -> None:
    """Let the RoI pools learn the strides of the feature maps from a square without padding.

    torchvision infers them from the first batch that a pool sees, as the height of a map over that of the tallest image
    inside the padding, and keeps them. When that batch is padded by half or more (landscapes of 1024 x 683 in squares
    of 1024) the strides are wrong by a factor of two for good.
    """
    side = 8 * STRIDES[-1]
    channels = network.backbone.out_channels
    maps: dict[str, Any] = {
        str(level): torch.zeros(1, channels, side // stride, side // stride) for level, stride in enumerate(STRIDES)
    }
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        pool(maps, [torch.zeros(1, 4)], [(side, side)])
