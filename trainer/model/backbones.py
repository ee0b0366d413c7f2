"""The backbones: torchvision's ResNets and MobileNets with their norms, under an FPN of four maps and a pooled one.

Modules and names are those of torchvision's `resnet_fpn_backbone` and `mobilenet_backbone` (with `returned_layers`
1, 2, 3, 5), but that the FPN may be narrower. The four maps have strides of 4, 8, 16 and 32 with all of them, so the
same anchors serve; torchvision's own MobileNet detectors take two maps of stride 32, too coarse for small objects.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

from torch import nn
from torchvision.models import get_model
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import FrozenBatchNorm2d
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

NormName = Literal["frozen", "batch", "group"]
Norm = Callable[[int], nn.Module]

STRIDES = (4, 8, 16, 32)  # of the FPN's four maps; the fifth, pooled one has 64
GROUPS = 32


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that, while its weights are frozen, uses its saved statistics in training too and leaves them alone.

    Otherwise it is torch's. Statistics that went on renewing themselves under frozen weights would shift the very
    features that freezing is to keep.
    """

    def train(self, mode: bool = True) -> BatchNorm2d:
        """As torch's, but that it stays in evaluation mode while its weights do not train."""
        super().train(mode and self.weight.requires_grad)
        return self


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Group norm in 32 groups (Wu and He 2018), in fewer where the channels (of a MobileNet) do not divide; no group
    is a lone channel, for that would be another norm."""
    return nn.GroupNorm(math.gcd(GROUPS, channels // 2) if channels % 2 == 0 else 1, channels, eps=eps)


def norm_layer(norm: NormName, eps: float) -> Norm:
    """The norm as a function of its number of channels, as torchvision takes it.

    Args:
        norm: frozen (ImageNet's or COCO's statistics and weights as they are), batch, or group.
        eps: what is added to the variance.
    """
    kinds: dict[str, Callable[..., nn.Module]] = {
        "frozen": FrozenBatchNorm2d,
        "batch": BatchNorm2d,
        "group": group_norm,
    }
    return partial(kinds[norm], eps=eps)


def backbone_with_fpn(name: str, norm: Norm, fpn_channels: int, fpn_norm: Norm | None) -> BackboneWithFPN:
    """A backbone under its FPN, with random weights.

    Args:
        name: torchvision's, such as resnet50 or mobilenet_v2.
        norm: of the backbone.
        fpn_channels: width of each of the FPN's maps.
        fpn_norm: of the FPN; None for none, as in the first version of torchvision's detectors.
    """
    classifier = get_model(name, weights=None, norm_layer=norm)
    if name.startswith("resnet"):
        body, levels = classifier, [f"layer{level}" for level in (1, 2, 3, 4)]
        channels = [classifier.inplanes // 8 * 2**level for level in range(4)]
    else:
        body = classifier.features
        # Where torchvision's extractor looks: at the first blocks of stride 4, 8 and 16, and at the last convolution.
        strided = [number for number, block in enumerate(body) if getattr(block, "_is_cn", False)]
        numbers = [*strided[:3], len(body) - 1]
        levels, channels = [str(number) for number in numbers], [body[number].out_channels for number in numbers]
    return BackboneWithFPN(
        body,
        return_layers={level: str(number) for number, level in enumerate(levels)},
        in_channels_list=channels,
        out_channels=fpn_channels,
        extra_blocks=LastLevelMaxPool(),
        norm_layer=fpn_norm,
    )
