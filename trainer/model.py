"""Building torchvision's Mask R-CNN from settings, and loading weights into it.

The network is torchvision's own class with torchvision's own names: with the standard widths its `state_dict` loads
into `torchvision.models.detection.maskrcnn_resnet50_fpn` with `strict=True` and gives the same detections, and the
other way round.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn
from torchvision.models import get_model, get_model_weights
from torchvision.models.detection import MaskRCNN, MaskRCNN_ResNet50_FPN_Weights
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

from shards.dataset import Category
from shards.errors import StorageError, UserError
from shards.storage import Location
from trainer.config import DataConfig, ModelConfig

BODY = "backbone.body."
BOX_POOL = 7  # torchvision's side of the box head's RoI features
NORM_EPS = 1e-5
# From the output: what `trainable_layers` counts.
STAGES = ("layer4", "layer3", "layer2", "layer1", "conv1")

# torchvision renamed these layers in 0.14; its published weights still carry the old names.
RENAMED = (
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
    (re.compile(r"(mask_head)\.mask_fcn(\d+)\.(weight|bias)$"), lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
)


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, as names in the network's `state_dict`.

    Attributes:
        source: none, imagenet, coco, or the file's place.
        loaded: tensors that now hold the source's values.
        missing: tensors of the network that keep their initial values.
        left_out: tensors of the source that found no place: of another name or shape.
    """

    source: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"weights {self.source}: {len(self.loaded)} tensors loaded"
        if self.missing:
            text += f"; initial values kept by {_layers(self.missing)}"
        if self.left_out:
            text += f"; left out {_layers(self.left_out)}"
        return text


def num_classes(categories: Iterable[Category]) -> int:
    """The network's number of classes: ids count from 1, the background is 0."""
    return max(category.id for category in categories) + 1


def build_model(model: ModelConfig, data: DataConfig, num_classes: int, *, pretrained: bool = True) -> MaskRCNN:
    """torchvision's Mask R-CNN with a ResNet-FPN backbone, its backbone's lowest layers frozen.

    Args:
        model: the settings. With weights `imagenet` the backbone's are downloaded (or taken from torch's cache); all
            other weights are left to `load_weights`, and `none` and paths never touch the network. With `none` every
            layer trains, as in torchvision: random layers are not worth freezing.
        data: `min_size` and `max_size` are the sizes that inference resizes to.
        num_classes: classes and the background.
        pretrained: False leaves the download out, for a network whose weights come from a checkpoint.

    Raises:
        UserError: a download failed, or `coco` weights for a network that is not COCO's.
    """
    if model.weights == "coco":
        _check_fits_coco(model)
    network = MaskRCNN(
        _backbone(model, pretrained),
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
        box_head=TwoMLPHead(model.fpn_channels * BOX_POOL**2, model.box_head_features),
        box_predictor=FastRCNNPredictor(model.box_head_features, num_classes),
        box_batch_size_per_image=model.rois_per_image,
        box_positive_fraction=model.positive_fraction,
        box_score_thresh=model.score_threshold,
        box_nms_thresh=model.nms_threshold,
        box_detections_per_img=model.detections_per_image,
        mask_head=MaskRCNNHeads(model.fpn_channels, model.mask_head_channels, dilation=1),
        mask_predictor=MaskRCNNPredictor(model.mask_head_channels[-1], model.mask_head_channels[-1], num_classes),
    )
    _fix_pooling_scales(network)
    return network


def _fix_pooling_scales(network: MaskRCNN) -> None:
    """Let the RoI pools learn the strides of the feature maps (4, 8, 16, 32) from a square without padding.

    torchvision infers them from the first batch that a pool sees, as the height of a map over that of the tallest image
    inside the padding, and keeps them. When that batch is padded by half or more (landscapes of 1024 x 683 in squares
    of 1024) the strides are wrong by a factor of two for good.
    """
    side = 8 * 32
    channels = network.backbone.out_channels
    maps = {str(level): torch.zeros(1, channels, side // 4 >> level, side // 4 >> level) for level in range(4)}
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        pool(maps, [torch.zeros(1, 4)], [(side, side)])


def _backbone(model: ModelConfig, pretrained: bool) -> BackboneWithFPN:
    """torchvision's `resnet_fpn_backbone`, whose FPN cannot be made narrower."""
    norm = FrozenBatchNorm2d if model.norm == "frozen" else nn.BatchNorm2d
    resnet = get_model(model.backbone, weights=None, norm_layer=norm)
    if model.weights == "imagenet" and pretrained:
        # The first version, as in torchvision's detection models.
        resnet.load_state_dict(_download(get_model_weights(model.backbone).IMAGENET1K_V1, "imagenet"))
    trainable = 5 if model.weights == "none" else model.trainable_layers
    stages = (*STAGES[:trainable], "bn1") if trainable == 5 else STAGES[:trainable]
    for name, parameter in resnet.named_parameters():
        parameter.requires_grad_(name.startswith(stages))
    narrowest = resnet.inplanes // 8
    return BackboneWithFPN(
        resnet,
        return_layers={f"layer{level}": str(level - 1) for level in (1, 2, 3, 4)},
        in_channels_list=[narrowest * 2**level for level in range(4)],
        out_channels=model.fpn_channels,
        extra_blocks=LastLevelMaxPool(),
    )


def load_weights(network: MaskRCNN, weights: str) -> LoadReport:
    """Start a network from given weights.

    A tensor is taken where name and shape agree. So the class-specific layers (box classifier and regressor, mask
    logits) keep their initial values when the numbers of classes differ.

    Args:
        network: from `build_model`.
        weights: `none`; `imagenet` (`build_model` has loaded it: only the report is made); `coco`, torchvision's
            download; else the path or URL of a safetensors or torch file: a `state_dict` of a Mask R-CNN, or of a
            ResNet for the backbone.

    Raises:
        UserError: a file that cannot be had or read, or that shares nothing with the network.
    """
    names = [name for name in network.state_dict() if not name.endswith("num_batches_tracked")]
    if weights == "none":
        return LoadReport(weights, missing=tuple(names))
    if weights == "imagenet":
        loaded = tuple(name for name in names if name.startswith(BODY))
        return LoadReport(weights, loaded, tuple(name for name in names if name not in set(loaded)))
    state = _coco_state() if weights == "coco" else _read_state(weights)
    return _load_state(network, state, weights)


def _load_state(network: MaskRCNN, state: dict[str, Tensor], source: str) -> LoadReport:
    own = {name: value for name, value in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    named = {_current_name(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}
    if not any(name in own for name in named):
        named = {BODY + name: value for name, value in named.items()}  # perhaps a bare ResNet
    loaded = {name: value for name, value in named.items() if name in own and own[name].shape == value.shape}
    if not loaded:
        raise UserError(
            f"model.weights {source}: none of its {len(state)} tensors has the name and shape of one in this network "
            f"(the first is {next(iter(state), 'missing')!r}): is it a Mask R-CNN with the same backbone and widths?"
        )
    network.load_state_dict(loaded, strict=False)
    return LoadReport(
        source,
        tuple(loaded),
        tuple(name for name in own if name not in loaded),
        tuple(name for name in named if name not in loaded),
    )


def _current_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _read_state(weights: str) -> dict[str, Tensor]:
    try:
        data = Location(weights).read()
    except StorageError as error:
        raise UserError(f"model.weights is none, imagenet, coco or the path or URL of a state dict: {error}") from error
    try:
        # A safetensors file is a length of eight bytes and a JSON object; a torch file is a zip, an old one a pickle.
        if data[8:9] == b"{":
            state: Any = safetensors.torch.load(data)
        elif data[:2] == b"PK" or data[:1] == b"\x80":
            state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            raise ValueError("it begins like no such file")
    except Exception as error:  # a damaged file can end the readers in any error, KeyError and IndexError among them
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"model.weights {weights}: cannot be read as a safetensors or torch file: {reason}") from error
    if isinstance(state, dict) and isinstance(state.get("model"), dict):
        state = state["model"]  # a checkpoint of torchvision's reference scripts
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.weights {weights}: holds {type(state).__name__}, not a state dict of names and tensors")
    return state


def _coco_state() -> dict[str, Tensor]:
    """torchvision's COCO weights for a network with the usual epsilon.

    They were trained with an epsilon of 0, which torchvision restores by changing the network (`overwrite_eps`). Taking
    it off the variances gives the same function, and checkpoints that are right in any Mask R-CNN of torchvision's.
    """
    state = _download(MaskRCNN_ResNet50_FPN_Weights.COCO_V1, "coco")
    return {
        name: value - NORM_EPS if name.startswith(BODY) and name.endswith("running_var") else value
        for name, value in state.items()
    }


def _check_fits_coco(model: ModelConfig) -> None:
    standard = ModelConfig()
    for name in ("backbone", "norm", "fpn_channels", "box_head_features", "mask_head_channels"):
        value, needed = getattr(model, name), getattr(standard, name)
        if value != needed:
            raise UserError(
                f"model.weights is coco, which torchvision has for model.{name} {needed}, not {value}: "
                f"set --model.{name} {str(needed).replace(' ', '')}, or choose other weights"
            )
    if len(model.anchor_ratios) != len(standard.anchor_ratios):
        raise UserError(
            f"model.weights is coco, which torchvision has for {len(standard.anchor_ratios)} model.anchor_ratios, "
            f"not {len(model.anchor_ratios)}"
        )


def _download(weights: Any, name: str) -> dict[str, Tensor]:
    """The state dict of a torchvision weights enum, by way of torch's cache."""
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"model.weights {name}: {weights.url} cannot be downloaded ({error}): use --model.weights none, "
            "or give the path of a copy"
        ) from error
    return state


def _layers(names: Iterable[str], most: int = 6) -> str:
    """Tensor names as the layers they belong to: `roi_heads.box_predictor.cls_score, ...`."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    more = f" and {len(layers) - most} more layers" if len(layers) > most else ""
    return ", ".join(layers[:most]) + more
