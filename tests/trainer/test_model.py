"""Building and loading, against torchvision's `maskrcnn_resnet50_fpn`."""

from __future__ import annotations

import re
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torchvision.models import ResNet18_Weights, resnet18
from torchvision.models.detection import maskrcnn_resnet50_fpn
from torchvision.models.detection._utils import overwrite_eps
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d

from shards.dataset import Category
from shards.errors import UserError
from trainer.config import DataConfig, ModelConfig, load_config
from trainer.model import build_model, load_weights, num_classes

CONFIGS = Path(__file__).parents[2] / "configs"
DATA = DataConfig(min_size=96, max_size=128)


def narrow(**changes) -> ModelConfig:
    values = {"backbone": "resnet18", "weights": "none", "fpn_channels": 8, "box_head_features": 8}
    return ModelConfig(**{**values, "mask_head_channels": [8], **changes})


@pytest.fixture(autouse=True)
def no_downloads(monkeypatch):
    """Any download that a test does not expect fails, and says so."""

    def refuse(url, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)


@pytest.fixture(scope="module")
def stock():
    """torchvision's network as it builds it, with statistics that are not the identity."""
    torch.manual_seed(0)
    network = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=128, box_score_thresh=0.0
    )
    rng = torch.Generator().manual_seed(1)
    for name, value in network.state_dict().items():
        if name.endswith("running_var"):
            value.copy_(torch.rand(value.shape, generator=rng) + 0.5)
        elif name.endswith("running_mean"):
            value.copy_(torch.rand(value.shape, generator=rng) * 0.1)
    return network.eval()


@pytest.fixture(scope="module")
def ours():
    return build_model(ModelConfig(weights="none", score_threshold=0.0), DATA, 5).eval()


def detections(network, seed: int = 0):
    image = torch.from_numpy(np.random.default_rng(seed).random((3, 70, 90), dtype=np.float32))
    with torch.no_grad():
        return network([image])[0]


def assert_same_detections(a, b, tolerance: float = 1e-3) -> None:
    """Up to the rounding that frozen and unfrozen norms differ in."""
    first, second = detections(a), detections(b)
    assert len(first["boxes"]) > 5
    for name in ("boxes", "labels", "scores", "masks"):
        assert torch.allclose(first[name], second[name], rtol=tolerance, atol=tolerance), name


def test_state_dicts_load_both_ways_and_detect_the_same(stock, ours):
    ours.load_state_dict(stock.state_dict(), strict=True)
    assert_same_detections(ours, stock)
    fresh = maskrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=5, min_size=96, max_size=128, box_score_thresh=0.0
    )
    fresh.load_state_dict({name: value.clone() for name, value in ours.state_dict().items()}, strict=True)
    assert_same_detections(fresh.eval(), ours)


def test_settings_reach_the_network():
    settings = narrow(
        norm="batch",
        anchor_sizes=[8, 16, 32, 64, 128],
        anchor_ratios=[1.0, 2.0],
        rpn_pre_nms=[11, 12],
        rpn_post_nms=[13, 14],
        rois_per_image=15,
        positive_fraction=0.4,
        score_threshold=0.3,
        nms_threshold=0.6,
        detections_per_image=7,
    )
    network = build_model(settings, DATA, 3)
    heads = network.roi_heads
    assert network.transform.min_size == (96,)
    assert network.transform.max_size == 128
    assert network.rpn.anchor_generator.sizes == ((8,), (16,), (32,), (64,), (128,))
    assert network.rpn.head.cls_logits.out_channels == 2
    assert network.rpn._pre_nms_top_n == {"training": 11, "testing": 12}
    assert network.rpn._post_nms_top_n == {"training": 13, "testing": 14}
    assert (heads.fg_bg_sampler.batch_size_per_image, heads.fg_bg_sampler.positive_fraction) == (15, 0.4)
    assert (heads.score_thresh, heads.nms_thresh, heads.detections_per_img) == (0.3, 0.6, 7)
    assert isinstance(network.backbone.body["bn1"], torch.nn.BatchNorm2d)
    assert isinstance(build_model(narrow(), DATA, 3).backbone.body["bn1"], FrozenBatchNorm2d)


@pytest.mark.parametrize("layers", range(6))
def test_freezing_is_torchvisions(layers, monkeypatch):
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: resnet18().state_dict())
    expected = resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=layers, norm_layer=torch.nn.BatchNorm2d
    )
    actual = build_model(narrow(weights="imagenet", norm="batch", trainable_layers=layers), DATA, 3).backbone
    assert {n for n, p in actual.named_parameters() if p.requires_grad} == {
        n for n, p in expected.named_parameters() if p.requires_grad
    }


def test_without_weights_all_layers_train():
    network = build_model(narrow(trainable_layers=1), DATA, 3)
    assert all(parameter.requires_grad for parameter in network.parameters())
    assert load_weights(network, "none").loaded == ()


def test_pooling_scales_do_not_depend_on_the_first_batch():
    """torchvision would infer a scale of 1/2 from a landscape in a square, and keep it."""
    network = build_model(narrow(), DATA, 3)
    for pool in (network.roi_heads.box_roi_pool, network.roi_heads.mask_roi_pool):
        maps = {str(i): torch.zeros(1, 8, 32 >> i, 32 >> i) for i in range(4)}
        pool(maps, [torch.zeros(1, 4)], [(60, 128)])
        assert pool.scales == [1 / 4, 1 / 8, 1 / 16, 1 / 32]


def test_imagenet_weights_reach_the_backbone(monkeypatch):
    torch.manual_seed(3)
    state = resnet18().state_dict()
    asked = []

    def download(url, *args, **kwargs):
        asked.append((url, kwargs["weights_only"], kwargs["check_hash"]))
        return state

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", download)
    settings = narrow(weights="imagenet")
    network = build_model(settings, DATA, 3)
    assert asked == [(ResNet18_Weights.IMAGENET1K_V1.url, True, True)]
    assert torch.equal(network.backbone.body["layer4"][1].conv2.weight, state["layer4.1.conv2.weight"])
    report = load_weights(network, "imagenet")
    assert len(report.loaded) == 100
    assert set(report.loaded) | set(report.missing) == set(network.state_dict())
    build_model(settings, DATA, 3, pretrained=False)
    assert len(asked) == 1


@pytest.mark.parametrize("weights", ["imagenet", "coco"])
def test_a_failed_download_names_the_remedy(weights):
    settings = narrow(weights=weights) if weights == "imagenet" else ModelConfig(weights=weights)
    with pytest.raises(UserError, match=rf"{weights}: https://.* cannot be downloaded.*--model.weights none"):
        load_weights(build_model(settings, DATA, 3), weights)


@pytest.mark.parametrize(
    ("option", "value"),
    [("backbone", "resnet101"), ("norm", "batch"), ("fpn_channels", 128), ("anchor_ratios", [0.5, 1.0])],
)
def test_coco_weights_need_cocos_network(option, value):
    with pytest.raises(UserError, match=rf"coco.*model\.{option}"):
        build_model(ModelConfig(weights="coco", **{option: value}), DATA, 3)


def test_coco_weights_load_but_for_the_classes(stock, monkeypatch):
    """With torchvision's published names and its epsilon of 0, into a network of the usual epsilon."""
    published = {_old_name(name): value for name, value in stock.state_dict().items() if "num_batches" not in name}
    assert {"rpn.head.conv.weight", "roi_heads.mask_head.mask_fcn1.bias"} < set(published)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *a, **k: published)

    network = build_model(ModelConfig(weights="coco", score_threshold=0.0), DATA, 5).eval()
    report = load_weights(network, "coco")
    assert report.missing == report.left_out == ()
    reference = build_model(ModelConfig(weights="none", score_threshold=0.0), DATA, 5).eval()
    reference.load_state_dict(stock.state_dict())
    overwrite_eps(reference, 0.0)
    assert_same_detections(network, reference)

    report = load_weights(build_model(ModelConfig(weights="coco"), DATA, 3), "coco")
    specific = {
        f"roi_heads.{layer}.{kind}"
        for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
        for kind in ("weight", "bias")
    }
    assert set(report.missing) == set(report.left_out) == specific
    assert "cls_score" in str(report)


def _old_name(name: str) -> str:
    name = re.sub(r"(fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name)
    name = name.replace("rpn.head.conv.0.0.", "rpn.head.conv.")
    return re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", name)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "torchvision checkpoint"])
def test_weights_from_a_file(tmp_path, kind):
    source, network = build_model(narrow(), DATA, 3), build_model(narrow(), DATA, 4)
    state, path = source.state_dict(), tmp_path / "weights.bin"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state if kind == "torch" else {"model": state, "epoch": 3}, path)
    report = load_weights(network, str(path))
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in report.loaded)
    assert len(report.missing) == len(report.left_out) == 6
    assert len(report.loaded) + 6 == len(state)


def test_a_bare_resnet_loads_into_the_backbone(tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    network = build_model(narrow(), DATA, 3)
    report = load_weights(network, str(tmp_path / "resnet18.pth"))
    assert len(report.loaded) == 100
    assert report.left_out == ("backbone.body.fc.weight", "backbone.body.fc.bias")


def test_weights_that_share_nothing_are_an_error(tmp_path):
    safetensors.torch.save_file({"encoder.weight": torch.zeros(3)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match=r"other\.safetensors: none of its 1 tensors"):
        load_weights(build_model(narrow(), DATA, 3), str(tmp_path / "other.safetensors"))


@pytest.mark.parametrize("content", [b"", b"hello", b"\x80\x02}q\x00.", b"12345678{not json"])
def test_a_file_of_another_kind_is_one_line(tmp_path, content):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.weights .*x\.bin") as error:
        load_weights(build_model(narrow(), DATA, 3), str(tmp_path / "x.bin"))
    assert "\n" not in str(error.value)


def test_nothing_is_unpickled(tmp_path):
    torch.save({"weight": Path("/")}, tmp_path / "x.pth")
    with pytest.raises(UserError, match=r"x\.pth"):
        load_weights(build_model(narrow(), DATA, 3), str(tmp_path / "x.pth"))


def test_a_misspelt_word_tells_what_there_is():
    with pytest.raises(UserError, match="none, imagenet, coco or the path"):
        load_weights(build_model(narrow(), DATA, 3), "imagnet")


def test_classes_count_from_one():
    assert num_classes([Category(1, "Person", "/m/01g317"), Category(2, "Car", "/m/0k4j")]) == 3


def test_the_traffic_recipe_loads():
    config = load_config(str(CONFIGS / "traffic.yaml"))
    assert (config.data.batch_size, config.data.resize, config.data.min_size, config.data.max_size) == (
        8,
        "square",
        800,
        1024,
    )
    assert (config.model.backbone, config.model.rois_per_image, config.model.positive_fraction) == (
        "resnet101",
        200,
        0.33,
    )
    assert (config.model.score_threshold, config.model.nms_threshold) == (0.7, 0.3)
    assert (config.optim.lr, config.optim.momentum, config.optim.weight_decay) == (0.001, 0.9, 1e-4)
    assert (config.optim.clip_norm, config.train.steps_per_epoch) == (5.0, 100)
