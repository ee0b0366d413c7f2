"""Backbones: torchvision's ResNets and MobileNets with a choice of norm, under an FPN.

Modules and names are those of torchvision's `resnet_fpn_backbone` and `mobilenet_backbone` (with `returned_layers`
1, 2, 3, 5), except that the FPN may be narrower. Every backbone has four maps of strides 4, 8, 16 and 32 and a pooled
one, so the same anchors suit all. torchvision's own MobileNet detectors use two maps of stride 32, too coarse for small
objects.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model, mobilenetv2, mobilenetv3, resnet
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.ops import misc
from torchvision.ops.feature_pyramid_network import LastLevelMaxPool

NormName = Literal["frozen", "batch", "group"]
Norm = Callable[[int], nn.Module]

STRIDES = (4, 8, 16, 32)  # of the FPN's four maps; the fifth, pooled one has 64
GROUPS = 32


class FrozenBatchNorm2d(misc.FrozenBatchNorm2d):
    """torchvision's batch norm with frozen statistics, which may compute its scale and shift once.

    torchvision's computes both from the four buffers in every call. Buffers and their names are the same, and results
    up to a rounding. See `cache_frozen_norms`.
    """

    cached: tuple[Tensor, Tensor] | None = None  # scale and shift, [C, 1, 1] each

    def forward(self, x: Tensor) -> Tensor:
        """Normalise x, [B, C, H, W]; in the wider of its dtype and that of scale and shift."""
        if self.cached is None:
            normalised: Tensor = super().forward(x)
            return normalised
        scale, shift = self.cached
        return torch.addcmul(shift, x, scale)

    def cache(self, dtype: torch.dtype) -> None:
        """Compute scale and shift in a dtype, to be used until weights are loaded or converted to another dtype."""
        scale = self.weight * (self.running_var + self.eps).rsqrt()
        shift = self.bias - self.running_mean * scale
        self.cached = scale.to(dtype)[:, None, None], shift.to(dtype)[:, None, None]

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
        self.cached = None
        super()._load_from_state_dict(*args, **kwargs)

    def _apply(self, *args: Any, **kwargs: Any) -> Any:
        # Whatever moves or converts a module calls this: accelerate does, even for a module that stays where it is.
        cached, before = self.cached, self.weight.dtype
        super()._apply(*args, **kwargs)
        self.cached = None
        if cached is not None and self.weight.dtype == before:
            self.cache(cached[0].dtype)
        return self


def cache_frozen_norms(network: nn.Module, dtype: torch.dtype) -> None:
    """Let every frozen batch norm of a network compute its scale and shift now, once, in a dtype.

    With float32 the outputs are float32 under autocast, too, as in torchvision. With autocast's own dtype they have
    that dtype: half the memory and less time, and less precise.
    """
    for module in network.modules():
        if isinstance(module, FrozenBatchNorm2d):
            module.cache(dtype)


def checkpoint_activations(network: nn.Module) -> None:
    """Let each block of a network's backbone keep its input only, and compute the rest again in the backward pass.

    Gradients are the same, as long as no batch norm of a block is in training mode.
    """
    for block in network.modules():
        if isinstance(
            block, (resnet.BasicBlock, resnet.Bottleneck, mobilenetv2.InvertedResidual, mobilenetv3.InvertedResidual)
        ):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)


class BatchNorm2d(nn.BatchNorm2d):
    """Batch norm that normalises with its saved statistics, and keeps them, while its weights are frozen.

    torch's own batch norm updates its statistics in training mode even when its weights are frozen, which changes the
    features that freezing is meant to keep.
    """

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but stay in evaluation mode while the weights are frozen."""
        super().train(mode and self.weight.requires_grad)
        return self


def group_norm(channels: int, eps: float) -> nn.GroupNorm:
    """Return a group norm of up to 32 groups (Wu and He, ECCV 2018).

    There are fewer groups where the channels (of a MobileNet) do not divide by 32, but at least two channels per group:
    groups of one channel would be instance norm.
    """
    return nn.GroupNorm(math.gcd(GROUPS, channels // 2) if channels % 2 == 0 else 1, channels, eps=eps)


def norm_layer(norm: NormName, eps: float) -> Norm:
    """Return the constructor of a norm from its number of channels, as torchvision expects it."""
    kinds: dict[str, Callable[..., nn.Module]]
    kinds = {"frozen": FrozenBatchNorm2d, "batch": BatchNorm2d, "group": group_norm}
    return partial(kinds[norm], eps=eps)


def backbone_with_fpn(name: str, norm: Norm, fpn_channels: int, fpn_norm: Norm | None) -> BackboneWithFPN:
    """Build a backbone by torchvision's name, such as resnet50, with an FPN, with random weights.

    Without `fpn_norm` the FPN has no norms, as in the first version of torchvision's detectors.
    """
    classifier = get_model(name, weights=None, norm_layer=norm)
    if name.startswith("resnet"):
        body, levels = classifier, [f"layer{level}" for level in (1, 2, 3, 4)]
        channels = [classifier.inplanes // 8 * 2**level for level in range(4)]
    else:
        body = classifier.features
        # The maps of torchvision's own extractor: the first blocks of stride 4, 8 and 16, and the last convolution.
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
