"""`build_model` and `rebuild`, against the networks that torchvision builds itself."""

import copy
import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torchvision.models.detection import MaskRCNN, maskrcnn_resnet50_fpn_v2
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from shards.storage.location import Location
from tests.support import CATEGORIES, REPOSITORY
from tests.trainer.batches import FEW, narrow, with_statistics
from trainer.config.settings import Config, DataConfig, ModelConfig
from trainer.config.yaml_config import load_config
from trainer.model.backbones import cache_frozen_norms, checkpoint_activations
from trainer.model.build import build_model, num_classes, rebuild
from trainer.model.checkpoint import CheckpointError, State, open_checkpoint, save

DATA = DataConfig(min_size=96, max_size=128)
STOCK_FEW = {"rpn_pre_nms_top_n_test": 60, "rpn_post_nms_top_n_test": 30, "box_detections_per_img": 8}
SIZES = {"num_classes": 3, "min_size": 96, "max_size": 128, "box_score_thresh": 0.0, **STOCK_FEW}


def stock(backbone: str, norm: str, version: str) -> MaskRCNN:
    """Build a network with torchvision's own functions."""
    if version == "v2":
        return maskrcnn_resnet50_fpn_v2(weights=None, weights_backbone=None, **SIZES)
    kind = {"weights": None, "norm_layer": FrozenBatchNorm2d if norm == "frozen" else nn.BatchNorm2d}
    if backbone.startswith("resnet"):
        body = resnet_fpn_backbone(backbone_name=backbone, **kind)
    else:
        body = mobilenet_backbone(backbone_name=backbone, fpn=True, returned_layers=[1, 2, 3, 5], **kind)
    anchors = AnchorGenerator(((32,), (64,), (128,), (256,), (512,)), ((0.5, 1.0, 2.0),) * 5)
    return MaskRCNN(body, rpn_anchor_generator=anchors, **SIZES)


def assert_same_detections(a: MaskRCNN, b: MaskRCNN, tolerance: float = 0.0) -> None:
    image = torch.from_numpy(np.random.default_rng(0).random((3, 70, 90), dtype=np.float32))
    with torch.no_grad():
        first, second = (network.eval()([image])[0] for network in (a, b))
    assert len(first["boxes"]) >= 5
    for name in ("boxes", "labels", "scores", "masks"):
        torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("backbone", "norm", "version", "stock_norm"),
    [
        ("resnet50", "batch", "v2", "batch"),
        ("mobilenet_v2", "frozen", "v1", "frozen"),
        ("mobilenet_v3_large", "batch", "v1", "batch"),
        ("resnet18", "frozen", "v1", "batch"),  # as torchvision's functions build it without weights
    ],
)
def test_weights_load_into_torchvisions_network_and_back_with_the_same_detections(backbone, norm, version, stock_norm):
    torch.manual_seed(0)
    expected = with_statistics(stock(backbone, stock_norm, version))
    settings = ModelConfig(backbone=backbone, norm=norm, version=version, weights="none", **FEW)
    network = build_model(settings, DATA, 3)
    network.load_state_dict(expected.state_dict(), strict=norm == stock_norm)
    # As from a safetensors file: without the version numbers of the modules.
    expected.load_state_dict({name: value.clone() for name, value in network.state_dict().items()}, strict=True)
    assert_same_detections(network, expected, tolerance=0.0 if norm == stock_norm else 1e-3)


@pytest.mark.parametrize(
    ("backbone", "norm", "version"),
    [("resnet18", "batch", "v1"), ("resnet18", "frozen", "v2"), ("mobilenet_v2", "group", "v2")],
)
def test_the_documented_function_rebuilds_a_checkpoint_in_plain_torchvision(tmp_path, backbone, norm, version):
    """Every setting that inference uses is away from its default."""
    [code] = re.findall(r"```python\n(.*?)```", (REPOSITORY / "docs" / "models.md").read_text(), re.DOTALL)
    documented: dict = {}
    exec(code, documented)
    rpn: dict[str, Any] = {"anchor_sizes": [16, 32, 64, 96, 128], "anchor_ratios": [0.4, 1.0], "rpn_pre_nms": [20, 50]}
    found = {"rpn_post_nms": [10, 25], "score_threshold": 0.01, "nms_threshold": 0.7, "detections_per_image": 9}
    model = ModelConfig(backbone=backbone, norm=norm, version=version, norm_eps=1e-2, **rpn | found)
    config = Config(model=model, data=DataConfig(min_size=90, max_size=140))
    torch.manual_seed(0)
    network = with_statistics(build_model(config.model, config.data, num_classes(CATEGORIES)))
    folder = save(Location(str(tmp_path)), State(7, 7, {}, CATEGORIES, config, network.state_dict(), None), keep=1)
    assert_same_detections(documented["stock_model"](folder.path), network)
    assert_same_detections(rebuild(open_checkpoint(str(tmp_path))), network)


def test_rebuild_refuses_weights_that_do_not_fit_the_settings_or_classes():
    config = Config(model=narrow())
    state = State(7, 7, {}, CATEGORIES, config, build_model(config.model, config.data, 3).state_dict(), None)
    with pytest.raises(CheckpointError, match=r"^.*1 class: .*cls_score.weight is \[3, 8\].*$"):
        rebuild(replace(state, categories=CATEGORIES[:1]))
    config.model.backbone = "resnet34"
    with pytest.raises(CheckpointError, match=r"^.*do not fit its own settings.*$"):
        rebuild(state)


def test_settings_of_training_reach_the_network():
    changes = {"rpn_pre_nms": [11, 12], "rpn_post_nms": [13, 14], "rois_per_image": 15, "positive_fraction": 0.4}
    network = build_model(narrow(**changes), DATA, 3)
    sampler = network.roi_heads.fg_bg_sampler
    assert network.rpn._pre_nms_top_n == {"training": 11, "testing": 12}
    assert network.rpn._post_nms_top_n == {"training": 13, "testing": 14}
    assert (sampler.batch_size_per_image, sampler.positive_fraction) == (15, 0.4)


@pytest.mark.parametrize("version", ["v1", "v2"])
@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_norms_are_of_the_requested_kind(backbone, norm, version):
    network = build_model(narrow(backbone=backbone, norm=norm, version=version), DATA, 3)
    kinds = {"frozen": FrozenBatchNorm2d, "batch": nn.BatchNorm2d, "group": nn.GroupNorm}
    norms: dict[str, Any]
    norms = {name: module for name, module in network.named_modules() if isinstance(module, tuple(kinds.values()))}
    body = {name for name in norms if name.startswith("backbone.body.")}
    assert len(body) >= 20
    assert all(isinstance(norms[name], kinds[norm]) for name in body)
    # FPN and heads start with random weights, for which there are no statistics to freeze.
    heads = nn.GroupNorm if norm == "group" else nn.BatchNorm2d
    assert all(isinstance(norms[name], heads) for name in norms.keys() - body)
    assert len(norms.keys() - body) == (0 if version == "v1" else 8 + 4 + 1)
    if norm == "group":
        assert all(module.num_channels // module.num_groups >= 2 for module in norms.values())
        assert backbone != "resnet18" or {norms[name].num_groups for name in body} == {32}


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_every_backbone_has_the_same_strides_and_pooling_scales(backbone):
    network = build_model(narrow(backbone=backbone), DATA, 3).eval()
    maps = network.backbone(torch.zeros(1, 3, 128, 192))
    assert [tuple(m.shape[-2:]) for m in maps.values()] == [(128 // s, 192 // s) for s in (4, 8, 16, 32, 64)]
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        # torchvision would infer a scale of 1/2 from this landscape in a square, and keep it.
        pool({str(i): torch.zeros(1, 8, 32 >> i, 32 >> i) for i in range(4)}, [torch.zeros(1, 4)], [(60, 128)])
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_the_traffic_recipe_has_matterports_settings():
    config = load_config("traffic")
    data, model, optim = config.data, config.model, config.optim
    assert (data.batch_size, data.resize, data.min_size, data.max_size) == (8, "square", 800, 1024)
    assert (model.backbone, model.rois_per_image, model.positive_fraction) == ("resnet101", 200, 0.33)
    assert (model.score_threshold, model.nms_threshold) == (0.7, 0.3)
    assert (optim.lr, optim.momentum, optim.weight_decay, optim.clip_norm) == (0.001, 0.9, 1e-4, 5.0)
    assert config.train.steps_per_epoch == 100


def test_frozen_norms_that_are_cached_return_what_torchvisions_return() -> None:
    torch.manual_seed(0)
    network = with_statistics(build_model(narrow(norm="frozen"), DATA, 3)).eval()
    norm: Any = network.backbone.body.bn1
    assert isinstance(norm, FrozenBatchNorm2d)
    image, maps = torch.rand(1, 3, 96, 128), torch.randn(2, 64, 9, 7)
    expected, normalised = network.backbone(image)["0"], norm(maps)
    cache_frozen_norms(network, torch.float32)
    torch.testing.assert_close(norm(maps), normalised, rtol=1e-6, atol=1e-6)  # one rounding less
    torch.testing.assert_close(network.backbone(image)["0"], expected, rtol=1e-4, atol=1e-4)
    with torch.autocast("cpu", torch.bfloat16):
        assert norm(maps.bfloat16()).dtype == torch.float32  # as in torchvision
        cache_frozen_norms(network, torch.bfloat16)
        assert norm(maps.bfloat16()).dtype == torch.bfloat16
    torch.testing.assert_close(norm(maps.bfloat16()).float(), normalised, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("backbone", ["resnet18", "mobilenet_v2", "mobilenet_v3_large"])
def test_checkpointed_activations_give_the_same_gradients_and_save_fewer(backbone: Any) -> None:
    torch.manual_seed(0)
    model = ModelConfig(backbone=backbone, weights="none", fpn_channels=8)
    network = build_model(model, DataConfig(min_size=64, max_size=64), 3).train()
    images = torch.rand((2, 3, 64, 64))

    trained = [parameter for parameter in network.backbone.parameters() if parameter.requires_grad]

    def gradients_and_saved() -> tuple[tuple[Tensor, ...], int]:
        saved = list[Tensor]()

        def save(tensor: Tensor) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            loss = torch.cat([level.flatten() for level in network.backbone(images).values()]).square().sum()
        return torch.autograd.grad(loss, trained), sum(tensor.numel() for tensor in saved)

    plain, most = gradients_and_saved()
    checkpoint_activations(network)
    again, least = gradients_and_saved()
    assert all(map(torch.equal, plain, again))
    assert least < 0.6 * most
    copy.deepcopy(network)  # as for an average of the weights


def test_cached_norms_are_forgotten_with_other_weights_or_another_type() -> None:
    for change in (lambda one: one.load_state_dict(one.state_dict()), nn.Module.double):
        network = with_statistics(build_model(narrow(norm="frozen"), DATA, 3))
        cache_frozen_norms(network, torch.float32)
        change(network)
        assert network.backbone.body.bn1.cached is None


def test_cached_norms_stay_cached_when_the_network_is_moved() -> None:
    network = with_statistics(build_model(narrow(norm="frozen"), DATA, 3))
    cache_frozen_norms(network, torch.bfloat16)
    scale, shift = network.backbone.body.bn1.cached
    network.to("cpu", memory_format=torch.channels_last)
    again, moved = network.backbone.body.bn1.cached
    assert again.dtype == torch.bfloat16
    assert torch.equal(again, scale)
    assert torch.equal(moved, shift)
