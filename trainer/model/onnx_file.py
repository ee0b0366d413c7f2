"""A checkpoint's network as an ONNX file: from an image of any size to the detections of torchvision's network.

torch's newer exporter (`dynamo=True`) cannot follow torchvision's NMS and RoI pooling, which branch on the number of
boxes (torch 2.14); the one that traces the network can, because torchvision has code for it.
"""

from __future__ import annotations

import io
import json
import logging
import warnings
from functools import partial
from typing import Any

import onnx
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from torch.onnx.operators import shape_as_tensor
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.transform import GeneralizedRCNNTransform

from trainer.model.build import rebuild
from trainer.model.checkpoint import DESCRIPTION, State, description

OPSET = 17
MASK_THRESHOLD = 0.5
INPUT = "image"
# Outputs, and their axes of variable length.
OUTPUTS = {
    "boxes": {0: "objects"},
    "labels": {0: "objects"},
    "scores": {0: "objects"},
    "masks": {0: "objects", 1: "height", 2: "width"},
}


def onnx_file(state: State) -> bytes:
    """Return a checkpoint's network as an ONNX file, with its classes and settings in the metadata.

    Input: `image`, uint8 [3, H, W] RGB of any size. Outputs, in descending order of score: `boxes`, float32 [N, 4]
    left, top, right, bottom in pixels of the image; `labels`, int64 [N] category ids; `scores`, float32 [N]; `masks`,
    bool [N, H, W].
    """
    buffer = io.BytesIO()
    example = torch.zeros(3, 120, 160, dtype=torch.uint8)  # of any size
    torch_log = logging.getLogger("torch.onnx")
    level = torch_log.level
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about each value that tracing takes for a constant, and about the exporter
        torch_log.setLevel(logging.ERROR)
        try:
            torch.onnx.export(
                _OneImage(rebuild(state)).eval().requires_grad_(False),  # `SharedMask`'s row becomes a constant
                (example,),
                buffer,  # type: ignore[arg-type]  # the exporter that traces also takes files
                dynamo=False,
                opset_version=OPSET,
                input_names=[INPUT],
                output_names=list(OUTPUTS),
                dynamic_axes={INPUT: {1: "height", 2: "width"}, **OUTPUTS},
            )
        finally:
            torch_log.setLevel(level)
    model = onnx.load_model_from_string(buffer.getvalue())
    names = {category.id: category.name for category in state.categories}
    metadata = {"classes": json.dumps(names), DESCRIPTION: json.dumps(description(state))}
    onnx.helper.set_model_props(model, metadata)
    data: bytes = model.SerializeToString()
    return data


class _OneImage(nn.Module):
    """The network as a function of one image, whose values are tensors that tracing can follow."""

    def __init__(self, network: MaskRCNN) -> None:
        super().__init__()
        self.network = network
        for norm in network.modules():
            if isinstance(norm, nn.GroupNorm):
                norm.forward = partial(_group_norm, norm)  # type: ignore[method-assign]
        old = network.transform
        network.transform = _Transform(old.min_size, old.max_size, old.image_mean, old.image_std, old.size_divisible)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Return the outputs of `onnx_file`."""
        [found] = self.network([image.float() / 255])
        return found["boxes"], found["labels"], found["scores"], found["masks"][:, 0] > MASK_THRESHOLD


def _group_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    """Normalise x, [B, C, H, W], as `norm` does, also without a row: the exporter's own operators then fail."""
    groups = x.unflatten(1, (norm.num_groups, norm.num_channels // norm.num_groups))  # [B, G, C / G, H, W]
    centred = groups - groups.mean((2, 3, 4), keepdim=True)
    variance = centred.square().mean((2, 3, 4), keepdim=True)
    normal: Tensor = (centred / (variance + norm.eps).sqrt()).reshape(x.shape)
    return normal * norm.weight[:, None, None] + norm.bias[:, None, None]


class _Transform(GeneralizedRCNNTransform):
    """torchvision's transform, with the image's size after resizing computed in float64, as Python does.

    When torchvision's own is traced it computes in float32, and in some sizes one row or column is lost.
    """

    def resize(self, image: Tensor, target: Any = None) -> tuple[Tensor, Any]:
        """Resize an image, [3, H, W], to at least one pixel, as `augment.scaled_size` says."""
        size = shape_as_tensor(image)[-2:].double()
        limits = torch.tensor([self.min_size[-1], self.max_size], dtype=torch.float64)
        factor = (limits / torch.stack((size.min(), size.max()))).min()  # a number / tensor would be rounded twice
        resized: Any = (size * factor).floor().clamp(min=1).long().unbind()
        return interpolate(image[None], size=resized, mode="bilinear", align_corners=False)[0], target
