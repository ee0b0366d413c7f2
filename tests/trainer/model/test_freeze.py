"""What trains, against torchvision's own freezing and against what a backward pass reaches."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

from shards.common.errors import UserError
from tests.trainer import tiny
from trainer.config.settings import ConfigError, DataConfig, ModelConfig
from trainer.config.yaml_config import load_config
from trainer.model.build import build_model
from trainer.model.freeze import (
    OUTPUTS,
    check_all_learned,
    from_output,
    parse_layers,
    set_trainable,
    trainable_parameters,
)

HEADS = ("backbone.fpn.", "rpn.", "roi_heads.")


def network(backbone: str = "resnet18", norm: str = "batch", version: str = "v1", channels: int = 8):
    narrow = {"fpn_channels": channels, "box_head_features": 8, "mask_head_channels": [8, 8]}
    settings = ModelConfig(backbone=backbone, norm=norm, version=version, weights="none", **narrow)
    return build_model(settings, DataConfig(min_size=64, max_size=64), 3)


# torchvision counts five stages of a ResNet; of a MobileNet six, for the last convolution is one of its own.
@pytest.mark.parametrize("norm", ["frozen", "batch"])
@pytest.mark.parametrize(
    ("layers", "resnet", "mobilenet"), [("heads", 0, 0), ("5+", 1, 2), ("4+", 2, 3), ("3+", 3, 4), ("2+", 4, 5)]
)
def test_stages_are_torchvisions(layers, resnet, mobilenet, norm):
    kinds = {"norm_layer": nn.BatchNorm2d, "weights": None} if norm == "batch" else {"weights": None}
    expected = {
        "resnet18": resnet_fpn_backbone(backbone_name="resnet18", trainable_layers=resnet, **kinds),
        "mobilenet_v3_large": mobilenet_backbone(
            backbone_name="mobilenet_v3_large",
            fpn=True,
            trainable_layers=mobilenet,
            returned_layers=[1, 2, 3, 5],
            **kinds,
        ),
    }
    for name, backbone in expected.items():
        ours = network(name, norm)
        names = set(trainable_parameters(ours, layers))
        trains = {f"backbone.{n}" for n, p in backbone.named_parameters() if p.requires_grad}
        assert {n for n in names if n.startswith("backbone.")} == trains
        # The heads always train.
        assert {n for n in names if not n.startswith("backbone.")} == {
            n for n, _ in ours.named_parameters() if not n.startswith("backbone.")
        }


def test_all_is_all_and_heads_are_no_backbone():
    ours = network()
    assert trainable_parameters(ours, "all") == [name for name, _ in ours.named_parameters()]
    assert trainable_parameters(ours, "heads") == [n for n, _ in ours.named_parameters() if n.startswith(HEADS)]


def test_set_trainable_sets_what_the_pure_function_says():
    ours = network()
    before = [name for name, p in ours.named_parameters() if p.requires_grad]
    names = trainable_parameters(ours, "5+")
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == before
    assert set_trainable(ours, "5+") == names
    assert [name for name, p in ours.named_parameters() if p.requires_grad] == names
    set_trainable(ours, "all")
    assert all(p.requires_grad for p in ours.parameters())


def test_layers_from_the_output_of_a_resnet101():
    """104 + 21 layers."""
    order = from_output(build_model(ModelConfig(backbone="resnet101"), DataConfig(), 5))
    assert len(order) == 125
    assert order[:7] == [
        "roi_heads.mask_predictor.mask_fcn_logits",
        "roi_heads.box_predictor.bbox_pred",
        "roi_heads.box_predictor.cls_score",
        "rpn.head.bbox_pred",
        "rpn.head.cls_logits",
        "roi_heads.mask_predictor.conv5_mask",
        "roi_heads.box_head.fc7",
    ]
    assert all(name.startswith(("rpn.", "roi_heads.")) for name in order[:13])  # 10 %: all heads
    assert order[13:15] == ["backbone.fpn.layer_blocks.3.0", "backbone.fpn.layer_blocks.2.0"]
    assert order[20:23] == [
        "backbone.fpn.inner_blocks.0.0",
        "backbone.body.layer4.2.conv3",
        "backbone.body.layer4.2.conv2",
    ]
    assert order[-1] == "backbone.body.conv1"


def test_the_comparison_of_5_10_and_15_percent_is_of_a_resnet50s_heads():
    resnet50 = build_model(ModelConfig(backbone="resnet50"), DataConfig(), 5)
    order = from_output(resnet50)
    assert len(order) == 53 + 21
    heads = set(order[:13])
    assert all(name.startswith(("rpn.", "roi_heads.")) for name in heads)
    trains = {
        share: {name.rpartition(".")[0] for name in trainable_parameters(resnet50, f"last {share}%")}
        for share in (5, 10, 15)
    }
    assert trains[5] == set(OUTPUTS) - {"rpn.head.cls_logits"}
    hidden = {"roi_heads.mask_predictor.conv5_mask", "roi_heads.box_head.fc7", "rpn.head.conv.0.0"}
    assert trains[10] == hidden | set(OUTPUTS)
    assert trains[15] == heads - {"roi_heads.mask_head.0.0"}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_share_is_the_same_layers_with_every_norm(version):
    orders = [from_output(network(norm=norm, version=version)) for norm in ("frozen", "batch", "group")]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(("share", "count"), [("1%", 1), ("5 %", 2), ("10%", 4), ("12.5%", 5), ("100%", 39)])
def test_a_share_counts_layers_upwards(share, count):
    ours = network()
    order = from_output(ours)
    assert len(order) == 39  # 20 of the ResNet, 8 of the FPN, 3 of the RPN, 8 of the heads
    names = trainable_parameters(ours, f"last {share}")
    modules = dict(ours.named_modules())
    layers = {n.rpartition(".")[0] for n in names if not isinstance(modules[n.rpartition(".")[0]], nn.BatchNorm2d)}
    assert layers == set(order[:count])


def test_a_norm_trains_with_the_convolution_before_it():
    names = trainable_parameters(network(version="v2"), "last 60%")
    layers = {name.rpartition(".")[0] for name in names}
    pairs = {("layer4.1.conv2", "layer4.1.bn2"), ("layer3.1.conv1", "layer3.1.bn1"), ("conv1", "bn1")}
    for convolution, norm in pairs:
        assert (f"backbone.body.{convolution}" in layers) == (f"backbone.body.{norm}" in layers)
    assert "backbone.body.layer4.1.bn2" in layers
    assert "roi_heads.mask_head.0.1" in layers


@pytest.mark.parametrize("layers", ["heads", "4+", "last 15%"])
def test_frozen_layers_are_left_alone_by_training(layers):
    """With batch norm, in training mode, over a change of mode and a copy: no weight and no statistic moves."""
    torch.manual_seed(0)
    ours = network(version="v2")
    trains = set(set_trainable(ours, layers))
    ours = copy.deepcopy(ours.train().eval().train())
    before = {name: value.clone() for name, value in ours.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in ours.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}
    sum(ours([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, target]).values()).backward()
    optimizer.step()
    moved = {name for name, value in ours.state_dict().items() if not torch.equal(value, before[name])}
    owners = {name.rpartition(".")[0] for name in trains}
    assert moved <= {name for name in before if name.rpartition(".")[0] in owners}
    assert trains <= moved | {n for n in trains if before[n].abs().max() == 0}  # a bias at 0 may get no gradient


def test_a_batch_norm_that_trains_again_renews_its_statistics():
    ours = network()
    set_trainable(ours.train(), "heads")
    assert not ours.backbone.body["bn1"].training
    set_trainable(ours, "all")
    assert ours.backbone.body["bn1"].training
    assert not ours.eval().backbone.body["bn1"].training


@pytest.mark.parametrize("layers", ["", "head", "6+", "1+", "last", "last 0%", "last 101%", "last -5%", "10%"])
def test_what_means_nothing_is_one_line(layers):
    with pytest.raises(UserError, match=r"train\.layers is .*heads, 5\+, 4\+, 3\+, 2\+, all, or a share"):
        parse_layers(layers)


def test_the_setting_is_checked_before_anything_starts(tmp_path: Path):
    with pytest.raises(UserError, match=r"train\.layers is '7\+'"):
        load_config(None, [("train.layers", "7+")])
    assert load_config(None, [("train.layers", "last 10%")]).train.layers == "last 10%"
    with pytest.raises(ConfigError, match=r"unknown option 'model\.trainable_layers'"):
        load_config(None, [("model.trainable_layers", "3")])


def test_random_layers_must_train():
    ours = network()
    everything = [name for name, _ in ours.named_parameters()]
    body = [name for name in everything if name.startswith("backbone.body.")]
    check_all_learned(ours, everything, trainable_parameters(ours, "all"))
    check_all_learned(ours, [n for n in everything if n not in body], trainable_parameters(ours, "heads"))
    with pytest.raises(
        UserError, match=r"would leave random .*backbone\.body\.conv1, .* and \d+ more.*--train\.layers all"
    ):
        check_all_learned(ours, everything, trainable_parameters(ours, "heads"))
    with pytest.raises(UserError, match="would leave random"):
        check_all_learned(ours, [n for n in everything if n not in body], trainable_parameters(ours, "last 10%"))


@pytest.mark.slow
def test_training_from_nothing_with_frozen_layers_is_refused(dataset: Path, tmp_path: Path):
    done = tiny.run(tiny.ROOT / "trainer/train.py", tiny.arguments(dataset, tmp_path / "run", train__layers="3+"))
    assert done.returncode == 2
    assert "train.layers would leave random" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
