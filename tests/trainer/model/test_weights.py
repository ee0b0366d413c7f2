"""`load_weights`: what is loaded, what is left out, what is reported, and what is refused."""

import argparse
import contextlib
import json
import re
import urllib.error
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import nn
from torchvision.models import ResNet18_Weights, mobilenet_v3_large, resnet18
from torchvision.models.detection._utils import overwrite_eps

from shards.common.errors import UserError
from shards.format.dataset import Category
from shards.storage.location import Location
from tests.trainer.batches import FEW, narrow, with_statistics
from trainer.config.settings import Config, DataConfig, ModelConfig
from trainer.model.build import build_model
from trainer.model.checkpoint import State, save
from trainer.model.weights import COCO, load_weights, with_eps

DATA = DataConfig(min_size=64, max_size=64)
TWO = (Category(1, "Person", "/m/01g317"), Category(2, "Bicycle", "/m/0199g"))  # ids and names of COCO's first two
OTHER = (Category(1, "Person", "/m/01g317"), Category(2, "Car", "/m/0k4j"))
SPECIFIC = {
    f"roi_heads.{layer}.{kind}"
    for layer in ("box_predictor.cls_score", "box_predictor.bbox_pred", "mask_predictor.mask_fcn_logits")
    for kind in ("weight", "bias")
}


def build(settings: ModelConfig, classes: int = 3):
    return build_model(settings, DATA, classes)


def load(settings: ModelConfig, classes=TWO):
    network = build(settings)
    return network, load_weights(network, settings, classes)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """torch's cache, empty; every download fails."""

    def refuse(url, *args, **kwargs):
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr("torch.hub.urlopen", refuse)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    folder = tmp_path / "torch" / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    return folder


def published(version: str, state, folder: Path) -> Path:
    """Write a file as torchvision publishes it, with the names from before 0.14 for the first version."""
    names = {}
    for name, value in state.items():
        old = re.sub(r"(fpn\.\w+_blocks\.\d)\.0\.", r"\1.", name).replace("rpn.head.conv.0.0.", "rpn.head.conv.")
        old = re.sub(r"mask_head\.(\d)\.0\.", lambda m: f"mask_head.mask_fcn{int(m[1]) + 1}.", old)
        if "num_batches" not in name:
            names[old if version == "v1" else name] = value
    path = folder / COCO[version][0].url.rsplit("/", 1)[-1]
    torch.save(names, path)
    return path


@contextlib.contextmanager
def refused(message: str) -> Iterator[None]:
    """Expect a `UserError` of one line."""
    with pytest.raises(UserError, match=message) as error:
        yield
    assert str(error.value).isprintable()


def test_imagenet_weights_load_into_the_backbone(cache):
    state = with_statistics(resnet18()).state_dict()
    torch.save(state, cache / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1])
    network, report = load(narrow(weights="imagenet", norm="frozen"))
    body = network.backbone.body.state_dict()
    assert len(report.loaded) == len(body) == 100
    assert all(torch.equal(value, state[name]) for name, value in body.items())
    assert set(report.loaded) | set(report.missing) == set(network.state_dict())
    assert report.left_out == ("backbone.body.fc.weight", "backbone.body.fc.bias")
    assert "backbone.body             100 of 100" in str(report)
    assert "not loaded from the source: backbone.body.fc" in str(report)


@pytest.mark.parametrize("norm", ["frozen", "batch", "group"])
def test_a_backbone_computes_the_same_as_its_classifier_with_another_epsilon(norm, tmp_path):
    """MobileNetV3 was trained with 0.001, networks have 0.00001."""
    torch.manual_seed(0)
    classifier = mobilenet_v3_large().eval()
    with_statistics(classifier, lowest=0.01)
    torch.save(classifier.state_dict(), tmp_path / "large.pth")
    network, report = load(narrow(weights=str(tmp_path / "large.pth"), backbone="mobilenet_v3_large", norm=norm))
    assert not any(name.startswith("backbone.body.") for name in report.missing)
    if norm == "group":  # loads the weights only
        assert "the statistics of 46 batch norms" in str(report)
        return
    image = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(
            list(network.eval().backbone.body(image).values())[-1], classifier.features(image), rtol=1e-3, atol=1e-4
        )


def test_with_eps_is_precise_for_tiny_variances():
    """Subtracting the epsilon from the variance instead would lose the variance in rounding."""
    state = nn.Sequential(nn.BatchNorm2d(4)).state_dict()
    state["0.running_var"].copy_(torch.tensor([1e-12, 1e-9, 1e-5, 1.0]))
    state["0.running_mean"].copy_(torch.tensor([0.1, -0.2, 0.3, 0.4]))
    mean, variance = (state[name][:, None, None] for name in ("0.running_mean", "0.running_var"))
    other = nn.Sequential(nn.BatchNorm2d(4, eps=1e-5)).eval()
    other.load_state_dict(with_eps(state, 0.0, 1e-5))
    x = torch.randn(2, 4, 3, 3)
    torch.testing.assert_close(other(x), (x - mean) / variance.sqrt(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("version", ["v1", "v2"])
def test_coco_weights_load_except_for_other_classes(cache, version):
    """From torch's cache, under the published name; the first version's norms have an epsilon of 0."""
    settings = ModelConfig(weights="coco", version=version, **FEW)
    torch.manual_seed(0)
    reference = build_model(settings, DATA, 91)
    state = with_statistics(reference).state_dict()
    state["backbone.body.bn1.running_var"].mul_(1e-6)  # a norm for which the epsilon matters
    state["backbone.body.bn1.weight"].mul_(1e-3)
    path = published(version, state, cache)
    if version == "v1":
        overwrite_eps(reference, 0.0)

    network = build_model(settings, DATA, 91)
    report = load_weights(network, settings, TWO)
    assert report.missing == report.left_out == ()
    if version == "v2":  # the network's own epsilon: nothing is converted
        assert all(torch.equal(value, state[name]) for name, value in network.state_dict().items())
        return
    image = torch.rand(3, 64, 64, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        found, expected = network.eval()([image])[0], reference.eval()([image])[0]
    assert len(expected["boxes"]) == 8
    for name in ("boxes", "labels", "scores", "masks"):
        torch.testing.assert_close(found[name], expected[name], rtol=1e-3, atol=1e-3)
    # The file is recognised by its path too: its norms are converted alike.
    before = {name: value.clone() for name, value in network.state_dict().items()}
    load_weights(network, replace(settings, weights=str(path)), TWO)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())

    # Other classes of the same number, and another number of classes.
    for other in (network, build_model(settings, DATA, 3)):
        report = load_weights(other, settings, OTHER)
        assert set(report.missing) == set(report.left_out) == SPECIFIC
    assert "the classes differ (class 2 is 'Car' here and 'bicycle' there)" in str(report)
    assert "roi_heads.box_predictor     0 of 4" in str(report)


IMAGENET, COCO_V1 = narrow(weights="imagenet"), ModelConfig(weights="coco")


@pytest.mark.parametrize(
    ("settings", "cached", "reason"),
    [(IMAGENET, b"", "no route"), (COCO_V1, b"", "no route"), (IMAGENET, b"PK half a file", "")],
    ids=["imagenet", "coco", "damaged"],
)
def test_a_failed_download_or_a_damaged_file_in_the_cache_is_one_line_with_remedies(cache, settings, cached, reason):
    if cached:
        (cache / ResNet18_Weights.IMAGENET1K_V1.url.rsplit("/", 1)[-1]).write_bytes(cached)
    message = (
        f"{settings.weights}: https://.* cannot be downloaded or read .*{reason}.*hub/checkpoints.*--model.weights"
    )
    with refused(message):
        load_weights(build(narrow()), settings, TWO)


@pytest.mark.parametrize(
    "changes", [{"backbone": "resnet101"}, {"fpn_channels": 128}, {"anchor_ratios": [0.5, 1.0]}], ids=str
)
def test_coco_weights_need_cocos_network(changes):
    [option] = changes
    with refused(rf"coco.*model\.{option}"):
        load_weights(build(narrow()), ModelConfig(weights="coco", **changes), TWO)


@pytest.mark.parametrize("kind", ["safetensors", "torch", "torchvision checkpoint", "of DistributedDataParallel"])
def test_weights_from_a_file(tmp_path, kind):
    state, path = build(narrow(), 4).state_dict(), tmp_path / "weights.bin"
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    elif kind == "of DistributedDataParallel":
        torch.save({"state_dict": {f"module.{name}": value for name, value in state.items()}}, path)
    else:
        arguments = argparse.Namespace(lr=0.02, data_path="coco")  # which torchvision's scripts save along
        torch.save(state if kind == "torch" else {"model": state, "epoch": 3, "args": arguments}, path)
    network, report = load(narrow(weights=str(path)))
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in report.loaded)
    assert set(report.missing) == set(report.left_out) == SPECIFIC
    # Without the counters of the 20 batch norms.
    assert len(report.loaded) == sum("num_batches" not in name for name in state) - 6
    assert "does not name its classes" in str(report)


def test_weights_from_a_url(s3, bucket, tmp_path):
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    s3.filesystem().put_file(str(tmp_path / "resnet18.pth"), f"{bucket}/resnet18.pth")
    for query in ("", "?download=true&signature=a%2Fb"):  # signed links have a query
        _, report = load(narrow(weights=f"{s3.endpoint_url}/{bucket}/resnet18.pth{query}"))
        assert len(report.loaded) == 100
    with refused(rf"model\.weights .*{s3.endpoint_url}/{bucket}/other\.pth"):
        load(narrow(weights=f"{s3.endpoint_url}/{bucket}/other.pth"))


@pytest.mark.parametrize("place", ["", "checkpoints/step-000007", "checkpoints/step-000007/model.safetensors"])
def test_weights_of_a_run_have_their_classes_and_epsilon(tmp_path, place):
    config = Config(model=narrow(norm_eps=1e-3))
    state = with_statistics(build(config.model)).state_dict()
    save(Location(str(tmp_path)), State(7, 7, {}, TWO, config, state, {}), keep=1)
    settings = narrow(weights=f"{tmp_path}/{place}", norm_eps=1e-3)
    network, report = load(settings)
    assert report.missing == report.left_out == ()
    assert all(torch.equal(network.state_dict()[name], state[name]) for name in report.loaded)
    # The same number of classes, but others: their layers are not loaded.
    report = load_weights(network, settings, OTHER)
    assert set(report.missing) == set(report.left_out) == SPECIFIC
    assert "class 2 is 'Car' here and 'Bicycle' there" in str(report)
    # Another epsilon: converted.
    network, _ = load(replace(settings, norm_eps=1e-5))
    norm = "backbone.body.bn1."
    weight, variance = state[f"{norm}weight"], state[f"{norm}running_var"]
    scale = network.state_dict()[f"{norm}weight"] / (variance + 1e-5).sqrt()
    torch.testing.assert_close(scale, weight / (variance + 1e-3).sqrt())


def test_frozen_norms_need_statistics(tmp_path):
    with refused(r"norm is frozen, and model\.weights none has no statistics for 20 of its 20"):
        load(narrow(norm="frozen"))
    # A smaller ResNet has no statistics for some of the norms.
    torch.save(resnet18().state_dict(), tmp_path / "resnet18.pth")
    with refused(r"no statistics for \d+ of its 36 norms .*--model\.norm batch or group"):
        load(narrow(weights=str(tmp_path / "resnet18.pth"), backbone="resnet34", norm="frozen"))
    assert load(narrow())[1].loaded == ()


def described(eps):
    return json.dumps({"categories": [{"id": 1, "name": "a"}], "model": {"norm_eps": eps}})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (safetensors.torch.save({"encoder.weight": torch.zeros(3)}), "none of its 1 tensors"),
        ({}, "none of its 0 tensors"),
        ({"weight": Path("/")}, "contains Python objects besides tensors.*save its state dict"),
        (b"", "cannot be read"),
        (b"hello", "cannot be read"),
        (b"\x80\x02}q\x00.", ""),
        (b"12345678{not json", "cannot be read"),
        *(
            (safetensors.torch.save({"x": torch.zeros(3)}, {"maskstream": text}), "its metadata 'maskstream' does not")
            for text in ("no JSON", "3", "[" * 5000, '{"categories": 3}', described(None), described(float("inf")))
        ),
    ],
)
def test_a_file_without_usable_weights_is_refused_in_one_line(tmp_path, content, message):
    path = tmp_path / "x.bin"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with refused(rf"model\.weights .*x\.bin: .*{message}"):
        load(narrow(weights=str(path)))


def test_a_missing_file_is_refused_with_the_possible_values(tmp_path):
    for place in (tmp_path, "imagnet"):
        with refused("none, imagenet, coco, a run folder, or the path or URL"):
            load(narrow(weights=str(place)))
