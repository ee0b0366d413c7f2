"""What trains: matterport's names for parts of the network, or a share of its layers counted from the output.

    heads            FPN, RPN, box and mask heads; no layer of the backbone
    5+, 4+, 3+, 2+   these, and the backbone from that stage on: stage n computes maps at a stride of 2^n
    all              everything
    last 10%         the last tenth of the layers, counted from the output

A ResNet's stage 5 is torchvision's `layer4`, stage 2 its `layer1`, stage 1 its stem; a MobileNet's stages begin at its
strided blocks. Frozen norms (`model.norm frozen`) never train; a batch norm trains with the convolution before it, and
while it does not it normalises with its saved statistics and leaves them alone (`backbones.BatchNorm2d`).

A layer is a convolution or a linear module, with the norm that follows it: so a share means the same layers whatever
the norm. Counted from the output means by the number of layers between a layer and the output of its own head, mask
head before box head before RPN where these are equal; then the FPN and the backbone backwards. The first five are
always the layers that speak of classes and boxes: the mask logits, the box regressor and classifier, and the RPN's two.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from shards.common.errors import UserError
from trainer.config.layer_names import LAST_STAGE, STEM_STAGE, parse_layers

if TYPE_CHECKING:  # torch takes seconds to import: the settings are checked without it
    from torchvision.models.detection import MaskRCNN

BODY = "backbone.body."
# The layers that are outputs themselves, in the order in which they are counted.
OUTPUTS = (
    "roi_heads.mask_predictor.mask_fcn_logits",
    "roi_heads.box_predictor.bbox_pred",
    "roi_heads.box_predictor.cls_score",
    "rpn.head.bbox_pred",
    "rpn.head.cls_logits",
)
HEADS = ("roi_heads.mask_", "roi_heads.box_", "rpn.")  # in the order of layers that are equally far


def trainable_parameters(network: MaskRCNN, layers: str) -> list[str]:
    """The names of the parameters that train, in the network's order; nothing is changed.

    Args:
        network: from `build_model`.
        layers: see the head of this module.

    Raises:
        UserError: `layers` means nothing.
    """
    part = parse_layers(layers)
    owners = _layers(network)
    if part.share is not None:
        ordered = from_output(network)
        chosen = set(ordered[: math.ceil(part.share * len(ordered))])
    else:
        stages = _stages(network)
        chosen = {name for name in set(owners.values()) if _stage_of(name, stages) >= part.stage}
    return [name for name, _ in network.named_parameters() if owners[name.rpartition(".")[0]] in chosen]


def set_trainable(network: MaskRCNN, layers: str) -> list[str]:
    """Let only these layers train: `requires_grad` of every parameter is set, and each batch norm follows its weights.

    Args:
        network: changed in place; call this before it is wrapped, for a wrapped model has looked already.
        layers: see the head of this module.

    Returns:
        The names of the parameters that train.

    Raises:
        UserError: `layers` means nothing.
    """
    names = trainable_parameters(network, layers)
    chosen = set(names)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in chosen)
    network.train(network.training)  # batch norms look at their weights here
    return names


def check_all_learned(network: MaskRCNN, missing: Iterable[str], trained: Iterable[str]) -> None:
    """Whether every parameter has been given a value or will learn one.

    Args:
        network: the model.
        missing: names that the starting weights did not hold (`LoadReport.missing`).
        trained: names that train, in any stage.

    Raises:
        UserError: some would keep random values to the end.
    """
    random = set(missing) - set(trained)
    names = [name.rpartition(".")[0] for name, _ in network.named_parameters() if name in random]
    if names:
        unlearned = list(dict.fromkeys(names))
        more = f" and {len(unlearned) - 3} more" if len(unlearned) > 3 else ""
        raise UserError(
            f"train.layers would leave random what model.weights does not hold: {', '.join(unlearned[:3])}{more}: "
            "train more (--train.layers all), or start from weights that hold them (--model.weights)"
        )


def from_output(network: MaskRCNN) -> list[str]:
    """The network's layers by name, the nearest to the output first: what a share is counted in."""
    layers = list(dict.fromkeys(_layers(network).values()))
    places = {name: i for i, name in enumerate(layers)}
    distances = {name: (0, OUTPUTS.index(name)) for name in OUTPUTS}
    for order, head in enumerate(HEADS):
        hidden = [name for name in layers if name.startswith(head) and name not in distances]
        distances |= {name: (distance, order) for distance, name in enumerate(reversed(hidden), start=1)}
    trunk = len(layers)  # farther than any layer of a head
    # The FPN's output convolutions come after its lateral ones, which torchvision registers first, too.
    return sorted(layers, key=lambda name: (*distances.get(name, (trunk, 0)), -places[name]))


def _layers(network: MaskRCNN) -> dict[str, str]:
    """The layer that each module with weights of its own belongs to, itself or the one before a norm."""
    from torch import nn

    layers: dict[str, str] = {}
    layer = ""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer = name
        if next(module.parameters(recurse=False), None) is not None:
            layers[name] = layer
    return layers


def _stages(network: MaskRCNN) -> dict[str, int]:
    """The stage of each child of the backbone's body."""
    stages, stage = {}, STEM_STAGE
    for name, module in network.backbone.body.named_children():
        # torchvision's MobileNets mark their strided blocks.
        stage = int(name[5:]) + 1 if name.startswith("layer") else stage + bool(getattr(module, "_is_cn", False))
        stages[name] = stage
    return stages


def _stage_of(layer: str, stages: dict[str, int]) -> int:
    return stages[layer.removeprefix(BODY).partition(".")[0]] if layer.startswith(BODY) else LAST_STAGE + 1
