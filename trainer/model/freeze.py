"""Which layers train: matterport's names for parts of the network, or a share of its layers counted from the output.

docs/models.md lists the values of `train.layers`. Stage 5 of a ResNet is torchvision's `layer4`, stage 2 its `layer1`,
stage 1 its stem; the stages of a MobileNet begin at its strided blocks. Frozen norms (`model.norm frozen`) never train.
A batch norm trains with the convolution before it; otherwise it normalises with its saved statistics and keeps them
(`backbones.BatchNorm2d`).

A layer is a convolution or a linear module with the norm that follows it, so a share means the same layers with every
norm. Layers are ordered by the number of layers between them and the output of their own head (ties: mask head, box
head, RPN), then come the FPN and the backbone from back to front. The first five are the output layers: mask logits,
box regressor, box classifier, and the RPN's two.
"""

import math
from collections.abc import Iterable

from torch import nn
from torchvision.models.detection import MaskRCNN

from shards.common.errors import UserError
from trainer.config.layer_names import STEM_STAGE, parse_layers

BODY = "backbone.body."
# The output layers, in the order in which they are counted.
OUTPUTS = (
    "roi_heads.mask_predictor.mask_fcn_logits",
    "roi_heads.box_predictor.bbox_pred",
    "roi_heads.box_predictor.cls_score",
    "rpn.head.bbox_pred",
    "rpn.head.cls_logits",
)
HEADS = ("roi_heads.mask_", "roi_heads.box_", "rpn.")  # in the order of layers at the same distance


def trainable_parameters(network: MaskRCNN, layers: str) -> list[str]:
    """Return the names of the parameters that `layers` selects, in the network's order; UserError if it is wrong."""
    part = parse_layers(layers)
    owners = _layers(network)
    if part.share is not None:
        ordered = layers_from_output(network)
        chosen = set(ordered[: math.ceil(part.share * len(ordered))])
    else:
        stages = _stages(network)
        names = ((name, name.removeprefix(BODY).partition(".")[0]) for name in set(owners.values()))
        chosen = {name for name, child in names if not name.startswith(BODY) or stages[child] >= part.stage}
    return [name for name, _ in network.named_parameters() if owners[name.rpartition(".")[0]] in chosen]


def set_trainable(network: MaskRCNN, layers: str) -> list[str]:
    """Set `requires_grad` of every parameter so that only these layers train, and return the names of their parameters.

    Call this before wrapping the network, because DDP reads `requires_grad` only then.
    """
    names = trainable_parameters(network, layers)
    for name, parameter in network.named_parameters():
        parameter.requires_grad_(name in names)
    network.train(network.training)  # batch norms set their mode by `requires_grad` of their weights
    return names


def check_all_learned(network: MaskRCNN, missing: Iterable[str], trained: Iterable[str]) -> None:
    """Raise UserError if a parameter is neither loaded (it is in `LoadReport.missing`) nor trained in any stage."""
    random = set(missing) - set(trained)
    layers = dict.fromkeys(name.rpartition(".")[0] for name, _ in network.named_parameters() if name in random)
    if layers:
        more = f" and {len(layers) - 3} more" if len(layers) > 3 else ""
        raise UserError(
            f"layers would stay random, because train.layers does not train them and model.weights does not contain "
            f"them: {', '.join(list(layers)[:3])}{more}: train more (--train.layers all), or start from weights that "
            "contain them (--model.weights)"
        )


def layers_from_output(network: MaskRCNN) -> list[str]:
    """Return the names of the network's layers in the order in which a share counts them, from the output on."""
    layers = list(dict.fromkeys(_layers(network).values()))
    places = {name: i for i, name in enumerate(layers)}
    distances = {name: (0, OUTPUTS.index(name)) for name in OUTPUTS}
    for order, head in enumerate(HEADS):
        hidden = [name for name in layers if name.startswith(head) and name not in distances]
        distances |= {name: (distance, order) for distance, name in enumerate(reversed(hidden), start=1)}
    trunk = len(layers)  # further than any layer of a head
    # FPN and backbone in the reverse of torchvision's order, in which the FPN's output convolutions come last.
    return sorted(layers, key=lambda name: (*distances.get(name, (trunk, 0)), -places[name]))


def _layers(network: MaskRCNN) -> dict[str, str]:
    """Map each module with parameters of its own to its layer: itself, or the layer before it for a norm."""
    layers: dict[str, str] = {}
    layer = ""
    for name, module in network.named_modules():
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            layer = name
        if next(module.parameters(recurse=False), None) is not None:
            layers[name] = layer
    return layers


def _stages(network: MaskRCNN) -> dict[str, int]:
    """Return the stage of each child of the backbone's body."""
    stages, stage = {}, STEM_STAGE
    for name, module in network.backbone.body.named_children():
        # torchvision's MobileNets mark their strided blocks.
        stage = int(name[5:]) + 1 if name.startswith("layer") else stage + bool(getattr(module, "_is_cn", False))
        stages[name] = stage
    return stages
