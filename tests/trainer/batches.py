"""Small networks, and batches of noise with elliptic objects."""

from dataclasses import replace
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN

from shards.format import rle
from shards.format.sample import Instance
from trainer.config.settings import DataConfig, LossConfig, ModelConfig
from trainer.data import augment
from trainer.data.instances import HAS_MASK, PREDICTED, Batch, padded, read_instances
from trainer.model.build import build_model
from trainer.step.trainable import Trainable

Module = TypeVar("Module", bound=nn.Module)
# Few proposals and detections: the heads of full width are slow on one thread.
FEW: dict[str, Any] = {"rpn_pre_nms": [60, 60], "rpn_post_nms": [30, 30]}
FEW |= {"detections_per_image": 8, "score_threshold": 0.0}
LOSSES = {"loss_objectness", "loss_rpn_box_reg", "loss_classifier", "loss_box_reg", "loss_mask"}


def narrow(**changes: Any) -> ModelConfig:
    """Settings of a ResNet-18 with narrow heads and random weights."""
    values: dict[str, Any] = {"backbone": "resnet18", "norm": "batch", "weights": "none", "mask_head_channels": [8]}
    return ModelConfig(**{**values, "fpn_channels": 8, "box_head_features": 8, **changes})


def with_statistics(network: Module, lowest: float = 0.5) -> Module:
    """Give norms random statistics that keep activations at an ordinary size; variances are at least `lowest`."""
    rng = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=rng) + lowest)
        elif name.endswith("running_mean"):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.1)
    return network


def small_network() -> MaskRCNN:
    """A network of four classes in training mode whose random weights are always the same."""
    widths = {"fpn_channels": 16, "box_head_features": 32, "mask_head_channels": [16]}
    few = {"rpn_pre_nms": [200, 100], "rpn_post_nms": [100, 50], "rois_per_image": 64}
    model = narrow(norm="frozen", anchor_sizes=[16, 32, 64, 128, 256], **widths, **few)
    torch.manual_seed(0)
    return build_model(model, DataConfig(min_size=96, max_size=128), 4).train()


def shallow_network() -> MaskRCNN:
    """A `small_network` with half the blocks, for `torch.compile`, which takes long for each."""
    network = small_network()
    for level in (1, 2, 3, 4):
        del getattr(network.backbone.body, f"layer{level}")[1]
    return network


def scene(seed: int, height: int, width: int, objects: int) -> tuple[Tensor, list[np.ndarray], Tensor]:
    """A noise image, uint8 [3, H, W], elliptic masks and labels."""
    rng = np.random.default_rng(seed)
    ys, xs = np.mgrid[:height, :width] + 0.5
    masks = []
    for _ in range(objects):
        h, w = rng.uniform(16, height / 2), rng.uniform(16, width / 2)
        y, x = rng.uniform(h / 2, height - h / 2), rng.uniform(w / 2, width - w / 2)
        masks.append(((((ys - y) / h * 2) ** 2 + ((xs - x) / w * 2) ** 2) <= 1).astype(np.uint8))
    image = torch.from_numpy(rng.integers(0, 256, (3, height, width), dtype=np.uint8))
    return image, masks, torch.from_numpy(rng.integers(1, 4, objects))


def batch_of(scenes: list[tuple[Tensor, list[np.ndarray], Tensor]]) -> Batch:
    """A batch as the loader makes it, with every class verified."""
    instances = []
    for _, masks, labels in scenes:
        encoded = [rle.encode(mask) for mask in masks]
        annotations = [Instance(int(c), rle.bounds(mask), mask) for c, mask in zip(labels, encoded, strict=True)]
        instances.append(read_instances(annotations))
    sizes = torch.tensor([image.shape[-2:] for image, _, _ in scenes])
    images = augment.empty_images(len(scenes), *map(augment.round_up, sizes.amax(0).tolist()))
    for (image, _, _), slot in zip(scenes, images, strict=True):
        augment.pad_into(image, slot)
    return Batch(
        images=images,
        sizes=sizes,
        image_ids=tuple(str(i) for i in range(len(scenes))),
        tiles=torch.tensor([[[0.0, 0, image.shape[-1], image.shape[-2]]] for image, _, _ in scenes]),
        verified=torch.ones((len(scenes), 1, 4), dtype=torch.bool),
        **padded(instances),
    )


SCENES = [scene(1, 128, 160, 4), scene(2, 96, 128, 1), scene(3, 120, 100, 0), scene(4, 128, 128, 6)]


def without_masks(batch: Batch, keep: Tensor) -> Batch:
    """The batch with masks only where `keep`, bool [B, G]."""
    return replace(batch, flags=torch.where(keep, batch.flags, batch.flags & ~HAS_MASK))


def with_predictions(batch: Batch, which: Tensor) -> Batch:
    """The batch with the masks `which`, bool [B, G], as predicted ones."""
    return replace(batch, flags=torch.where(which & (batch.flags > 0), batch.flags | PREDICTED, batch.flags))


def losses_of(network: MaskRCNN, batch: Batch, loss: LossConfig | None = None) -> dict[str, Tensor]:
    """The losses of a batch, with the same RoIs sampled in every call."""
    torch.manual_seed(7)
    losses: dict[str, Tensor] = Trainable(network, loss)(batch)
    assert set(losses) == LOSSES
    return losses


def gradients(network: MaskRCNN, losses: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradient of the sum of the losses with respect to every trainable parameter; each must be reached."""
    trained = {name: parameter for name, parameter in network.named_parameters() if parameter.requires_grad}
    found = torch.autograd.grad(torch.stack(list(losses.values())).sum(), list(trained.values()))
    return dict(zip(trained, found, strict=True))
