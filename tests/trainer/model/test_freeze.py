"""Which layers train, against torchvision's own freezing and against training."""

import copy

import pytest
import torch
from torch import nn
from torchvision.models.detection.backbone_utils import mobilenet_backbone, resnet_fpn_backbone

from shards.common.errors import UserError
from tests.trainer.batches import narrow
from trainer.config.layer_names import parse_layers
from trainer.config.settings import DataConfig, ModelConfig
from trainer.model.build import build_model
from trainer.model.freeze import OUTPUTS, check_all_learned, layers_from_output, set_trainable, trainable_parameters


def network(backbone: str = "resnet18", norm: str = "batch", version: str = "v1"):
    settings = narrow(backbone=backbone, norm=norm, version=version, mask_head_channels=[8, 8])
    return build_model(settings, DataConfig(min_size=64, max_size=64), 3)


def parameters(module: nn.Module) -> list[str]:
    return [name for name, _ in module.named_parameters()]


def training(module: nn.Module) -> list[str]:
    return [name for name, parameter in module.named_parameters() if parameter.requires_grad]


# torchvision counts five stages of a ResNet, and six of a MobileNet, where the last convolution is a stage.
@pytest.mark.parametrize(
    ("layers", "resnet", "mobilenet"), [("heads", 0, 0), ("5+", 1, 2), ("4+", 2, 3), ("3+", 3, 4), ("2+", 4, 5)]
)
def test_stages_are_torchvisions(layers, resnet, mobilenet):
    options = {"norm_layer": nn.BatchNorm2d, "weights": None}
    levels = {"fpn": True, "returned_layers": [1, 2, 3, 5]}
    large = "mobilenet_v3_large"
    expected = (
        (network(), resnet_fpn_backbone(backbone_name="resnet18", trainable_layers=resnet, **options)),
        # By default with frozen norms, which never train.
        (network(norm="frozen"), resnet_fpn_backbone(backbone_name="resnet18", trainable_layers=resnet, weights=None)),
        (network(large), mobilenet_backbone(backbone_name=large, trainable_layers=mobilenet, **levels, **options)),
    )
    for model, backbone in expected:
        heads = {n for n in parameters(model) if not n.startswith("backbone.")}
        assert set(trainable_parameters(model, layers)) == heads | {f"backbone.{n}" for n in training(backbone)}


def test_set_trainable_sets_requires_grad_and_trainable_parameters_does_not():
    model = network().train()
    before = training(model)
    names = trainable_parameters(model, "4+")
    assert training(model) == before
    assert set_trainable(model, "4+") == names == training(model)
    assert not model.backbone.body["bn1"].training
    set_trainable(model, "all")
    assert training(model) == parameters(model)
    assert model.backbone.body["bn1"].training  # a batch norm that trains again updates its statistics
    assert not model.eval().backbone.body["bn1"].training


def test_layers_of_a_resnet50_are_counted_from_the_output():
    resnet50 = build_model(ModelConfig(backbone="resnet50"), DataConfig(), 5)
    order = layers_from_output(resnet50)
    assert len(order) == 53 + 21
    heads = set(order[:13])
    assert all(name.startswith(("rpn.", "roi_heads.")) for name in heads)
    assert order[:7] == [*OUTPUTS, "roi_heads.mask_predictor.conv5_mask", "roi_heads.box_head.fc7"]
    assert order[13:15] == ["backbone.fpn.layer_blocks.3.0", "backbone.fpn.layer_blocks.2.0"]
    assert order[20:22] == ["backbone.fpn.inner_blocks.0.0", "backbone.body.layer4.2.conv3"]
    assert order[-1] == "backbone.body.conv1"
    layers = {
        share: {name.rpartition(".")[0] for name in trainable_parameters(resnet50, f"last {share}%")}
        for share in (5, 10, 15)
    }
    assert layers[5] == set(OUTPUTS) - {"rpn.head.cls_logits"}
    hidden = {"roi_heads.mask_predictor.conv5_mask", "roi_heads.box_head.fc7", "rpn.head.conv.0.0"}
    assert layers[10] == hidden | set(OUTPUTS)
    assert layers[15] == heads - {"roi_heads.mask_head.0.0"}


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_a_share_is_the_same_layers_with_every_norm(version):
    orders = [layers_from_output(network(norm=norm, version=version)) for norm in ("frozen", "batch", "group")]
    assert orders[0] == orders[1] == orders[2]


@pytest.mark.parametrize(("share", "count"), [("1%", 1), ("5 %", 2), ("10%", 4), ("12.5%", 5), ("100%", 39)])
def test_a_share_is_rounded_up_to_whole_layers(share, count):
    model = network()
    order = layers_from_output(model)
    assert len(order) == 39  # 20 of the ResNet, 8 of the FPN, 3 of the RPN, 8 of the heads
    owners = {name.rpartition(".")[0] for name in trainable_parameters(model, f"last {share}")}
    assert {name for name in owners if not isinstance(model.get_submodule(name), nn.BatchNorm2d)} == set(order[:count])


@pytest.mark.parametrize("layers", ["heads", "4+", "last 15%"])
def test_training_changes_no_weight_or_statistic_of_frozen_layers(layers):
    torch.manual_seed(0)
    model = network(version="v2")
    trains = set(set_trainable(model, layers))
    model = copy.deepcopy(model.train().eval().train())  # frozen norms stay frozen
    before = {name: value.clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 40.0]])
    target = {"boxes": boxes, "labels": torch.tensor([1]), "masks": torch.ones(1, 64, 64, dtype=torch.uint8)}
    sum(model([torch.rand(3, 64, 64), torch.rand(3, 64, 64)], [target, target]).values()).backward()
    optimizer.step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    owners = {name.rpartition(".")[0] for name in trains}
    assert changed <= {name for name in before if name.rpartition(".")[0] in owners}
    assert trains <= changed | {n for n in trains if before[n].abs().max() == 0}  # a bias at 0 may get no gradient


@pytest.mark.parametrize("layers", ["", "head", "6+", "1+", "last", "last 0%", "last 101%", "last -5%", "10%"])
def test_parse_layers_refuses_other_text_in_one_line(layers):
    with pytest.raises(UserError, match=r"train\.layers is .*heads, 5\+, 4\+, 3\+, 2\+, all, or a share"):
        parse_layers(layers)


def test_check_all_learned_refuses_layers_that_stay_random():
    model = network()
    everything = parameters(model)
    without_body = [name for name in everything if not name.startswith("backbone.body.")]
    check_all_learned(model, everything, trainable_parameters(model, "all"))
    check_all_learned(model, without_body, trainable_parameters(model, "heads"))
    for missing, layers, first in ((everything, "heads", r"backbone\.body\.conv1"), (without_body, "last 10%", r"\S+")):
        with pytest.raises(UserError, match=rf"would stay random.*: {first}, .* and \d+ more: .*--train\.layers all"):
            check_all_learned(model, missing, trainable_parameters(model, layers))
