"""Starting weights: torchvision's downloads, checkpoints of ours, files and URLs; and a report of what was taken.

Norms that were trained with another epsilon than `model.norm_eps` are converted as they are read: their weight is
multiplied by sqrt((var + eps of the network) / (var + eps of the source)), which leaves what a norm computes as it was
to float precision. torchvision's first COCO weights want an epsilon of 0 and MobileNetV3's want 0.001, and torchvision
changes the network for the former and forgets it for the latter; here every checkpoint is right in a network of
torchvision's with its usual 1e-5.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import pickle
import posixpath
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torchvision.models import get_model_weights
from torchvision.models.detection import MaskRCNN, MaskRCNN_ResNet50_FPN_V2_Weights, MaskRCNN_ResNet50_FPN_Weights
from torchvision.ops import FrozenBatchNorm2d

from shards.common.errors import StorageError, UserError
from shards.common.text import counted
from shards.format.dataset import Category
from shards.storage.location import Location
from trainer.config.settings import ModelConfig
from trainer.model.checkpoint import DESCRIPTION, NoCheckpointError, open_checkpoint

BODY = "backbone.body."
FILE_SUFFIXES = (".safetensors", ".pth", ".pt", ".bin", ".ckpt")
PARTS = (
    "backbone.body",
    "backbone.fpn",
    "rpn.head",
    "roi_heads.box_head",
    "roi_heads.box_predictor",
    "roi_heads.mask_head",
    "roi_heads.mask_predictor",
)
CLASS_SPECIFIC = ("roi_heads.box_predictor.", "roi_heads.mask_predictor.mask_fcn_logits.")

USUAL_EPS = 1e-5
CLASSIFIER_EPS = {"mobilenet_v3_large": 1e-3}  # with which torchvision builds and trained it
COCO = {  # by `model.version`, with the epsilon of its norms
    "v1": (MaskRCNN_ResNet50_FPN_Weights.COCO_V1, 0.0),
    "v2": (MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1, USUAL_EPS),
}

# torchvision renamed these layers in 0.14; its published weights still carry the old names.
RENAMED = (
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
    (re.compile(r"(mask_head)\.mask_fcn(\d+)\.(weight|bias)$"), lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
    (re.compile(r"^module\."), ""),  # saved from under torch's DistributedDataParallel
)


@dataclass(frozen=True)
class Source:
    """Weights as they were found.

    Attributes:
        name: none, imagenet, coco, or the place.
        state: tensors by name.
        classes: names by id that the class-specific layers were trained for; None where the source does not say.
        eps: epsilon of its norms; None where the source does not say.
    """

    name: str
    state: Mapping[str, Tensor]
    classes: Mapping[int, str] | None = None
    eps: float | None = None


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, as names in the network's `state_dict` (batch counters of norms apart).

    Attributes:
        source: none, imagenet, coco, or the file's place.
        loaded: tensors that now hold the source's values.
        missing: tensors of the network that keep their initial values.
        left_out: tensors of the source that found no place: of another name or shape, or for other classes.
        remark: why the class-specific layers were taken or not; empty where there was nothing to decide.
    """

    source: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    remark: str = ""

    def __str__(self) -> str:
        """A line a part of the network."""
        total = len(self.loaded) + len(self.missing)
        lines = [f"weights {self.source}: {len(self.loaded)} of {counted(total, 'tensor')} loaded"]
        for part in PARTS:
            loaded, missing = ([n for n in names if n.startswith(f"{part}.")] for names in (self.loaded, self.missing))
            if loaded or missing:
                kept = f", initial values kept by {_layers(missing)}" if loaded and missing else ""
                lines.append(f"  {part:<25}{len(loaded):>4} of {len(loaded) + len(missing)}{kept}")
        statistics = [name for name in self.left_out if name.endswith((".running_mean", ".running_var"))]
        if statistics:
            lines.append(f"  left out of the source: the statistics of {counted(len(statistics) // 2, 'batch norm')}")
        others = [name for name in self.left_out if name not in set(statistics)]
        if others:
            lines.append(f"  left out of the source: {_layers(others)}")
        if self.remark:
            lines.append(f"  {self.remark}")
        return "\n".join(lines)


def load_weights(network: MaskRCNN, model: ModelConfig, categories: Sequence[Category]) -> LoadReport:
    """Start a network from `model.weights`.

    A tensor is taken where name and shape agree. The class-specific layers (box classifier and regressor, mask logits)
    are taken only for the same classes: by their names where the source has them, else by their number.

    Args:
        network: from `build_model(model, ...)`.
        model: `weights` is `none`; `imagenet`, torchvision's for the backbone; `coco`, torchvision's for resnet50;
            a run folder or checkpoint of ours; else the path or URL of a safetensors or torch file: a `state_dict` of
            a Mask R-CNN, or of a classifier for the backbone.
        categories: what the network is to tell apart.

    Raises:
        UserError: weights that cannot be had or read, that share nothing with the network, or that leave frozen norms
            without statistics.
    """
    if model.weights == "none":
        report = LoadReport("none", missing=tuple(_tensors(network.state_dict())))
    else:
        report = _take(network, model, _find(model), categories)
    _check_frozen_norms(network, report)
    return report


def _find(model: ModelConfig) -> Source:
    if model.weights == "imagenet":
        # The first version, as in torchvision's detection models.
        return Source("imagenet", _download(get_model_weights(model.backbone).IMAGENET1K_V1, "imagenet"))
    if model.weights == "coco":
        _check_fits_coco(model)
        weights, eps = COCO[model.version]
        return Source("coco", _download(weights, "coco"), _coco_classes(weights), eps)
    place = Location(model.weights)
    if posixpath.splitext(_path(place))[1] in FILE_SUFFIXES:
        return _of_file(place)
    if place.is_local and os.path.isfile(place.path):
        return _of_file(place)
    try:
        state = open_checkpoint(place.url)
    except NoCheckpointError:
        return _of_file(place)
    classes = {category.id: category.name for category in state.categories}
    return Source(f"{place}, step {state.step}", state.weights, classes, state.config.model.norm_eps)


def _take(network: MaskRCNN, model: ModelConfig, source: Source, categories: Sequence[Category]) -> LoadReport:
    own = _tensors(network.state_dict())
    found, eps = _tensors(source.state), source.eps
    if not any(name in own for name in found):  # perhaps a bare classifier
        found = {BODY + name.removeprefix("features."): value for name, value in found.items()}
        eps = CLASSIFIER_EPS.get(model.backbone, USUAL_EPS)
    remark, excluded = "", tuple[str, ...]()
    if any(name.startswith(CLASS_SPECIFIC) for name in found):
        remark = _other_classes(source, categories)
        excluded = CLASS_SPECIFIC if remark else ()
        if source.classes is None:
            remark = "the source does not name its classes: their layers were taken where their number agrees"
    taken = {
        name: value
        for name, value in found.items()
        if name in own and own[name].shape == value.shape and not name.startswith(excluded)
    }
    if not taken:
        raise UserError(
            f"model.weights {source.name}: none of its {len(source.state)} tensors has the name and shape of one in "
            f"this network (the first is {next(iter(source.state), 'missing')!r}): is it a Mask R-CNN with the same "
            "backbone and widths, or a classifier of model.backbone's kind?"
        )
    network.load_state_dict(with_eps(taken, model.norm_eps if eps is None else eps, model.norm_eps), strict=False)
    return LoadReport(
        source.name,
        tuple(taken),
        tuple(name for name in own if name not in taken),
        tuple(name for name in found if name not in taken),
        remark,
    )


def with_eps(state: Mapping[str, Tensor], old: float, new: float) -> dict[str, Tensor]:
    """Tensors of a network whose norms compute with the epsilon `new` what they did with `old`.

    Args:
        state: by name. Norms are known by their `running_var`.
        old, new: added to the variance.
    """
    converted = dict(state)
    for name, variance in state.items():
        weight = f"{name.removesuffix('running_var')}weight"
        if old != new and name.endswith(".running_var") and weight in state:
            factor = ((variance.double() + new) / (variance.double() + old)).sqrt()
            converted[weight] = (state[weight].double() * factor).to(state[weight].dtype)
    return converted


def _of_file(place: Location) -> Source:
    try:
        data = place.read()
    except StorageError as error:
        raise UserError(
            f"model.weights is none, imagenet, coco, a run folder, or the path or URL of a state dict: {error}"
        ) from error
    source = Source(str(place), _read_state(data, str(place)))
    for weights, eps in COCO.values():
        # A copy of torchvision's file: its name ends in its hash.
        if posixpath.basename(_path(place)) == posixpath.basename(weights.url):
            return replace(source, classes=_coco_classes(weights), eps=eps)
    description = _description(data)
    if description is None:
        return source
    classes = {int(entry["id"]): str(entry["name"]) for entry in description["categories"]}
    return replace(source, classes=classes, eps=float(description["model"]["norm_eps"]))


def _path(place: Location) -> str:
    """The URL without what a signed link has behind it (https://host/weights.pth?signature=...)."""
    return place.url.partition("?")[0] if place.protocol in ("http", "https") else place.url


def _read_state(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        # A safetensors file is a length of eight bytes and a JSON object; a torch file is a zip, an old one a pickle.
        if data[8:9] == b"{":
            state: Any = safetensors.torch.load(data)
        elif data[:2] == b"PK" or data[:1] == b"\x80":
            # torchvision's reference scripts save the command line's arguments along; they are no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            raise ValueError("it begins like no such file")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.weights {name}: holds Python objects beside tensors, or is damaged: it is not read, since such "
            "a file could run code; save its state dict alone (torch.save(model.state_dict(), path))"
        ) from error
    except Exception as error:  # a damaged file can end the readers in any error, KeyError and IndexError among them
        raise UserError(
            f"model.weights {name}: cannot be read as a safetensors or torch file: {_reason(error)}"
        ) from error
    for key in ("model", "state_dict"):  # checkpoints of torchvision's reference scripts, and of others
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.weights {name}: holds {type(state).__name__}, not a state dict of names and tensors")
    return state


def _description(data: bytes) -> dict[str, Any] | None:
    """What a checkpoint's model.safetensors says of itself; None for other files."""
    if data[8:9] != b"{":
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(DESCRIPTION)
    return json.loads(text) if text else None


def _tensors(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """By their present names, without the counters that no computation reads."""
    return {_current_name(name): value for name, value in state.items() if not name.endswith("num_batches_tracked")}


def _current_name(name: str) -> str:
    for pattern, replacement in RENAMED:
        name = pattern.sub(replacement, name)
    return name


def _other_classes(source: Source, categories: Sequence[Category]) -> str:
    """How the source's classes differ; empty where they are the same or unknown. Case does not count: COCO's `person`
    is Open Images' `Person`."""
    for category in categories:
        name = "missing" if source.classes is None else source.classes.get(category.id, "missing")
        if source.classes is not None and name.casefold() != category.name.casefold():
            return (
                f"the classes differ (class {category.id} is {category.name!r} here and {name!r} there): "
                "box classifier, box regressor and mask logits start anew"
            )
    return ""


def _coco_classes(weights: Any) -> dict[int, str]:
    return dict(enumerate(weights.meta["categories"]))


def _check_frozen_norms(network: MaskRCNN, report: LoadReport) -> None:
    norms = {name for name, module in network.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    bare = [name for name in report.missing if name.removesuffix(".running_var") in norms]
    if bare:
        raise UserError(
            f"model.norm is frozen, and model.weights {report.source} has no statistics for {len(bare)} of its "
            f"{len(norms)} norms ({_layers(bare)}): set --model.norm batch or group, or start from other weights"
        )


def _check_fits_coco(model: ModelConfig) -> None:
    standard = ModelConfig()
    for name in ("backbone", "fpn_channels", "box_head_features", "mask_head_channels"):
        value, needed = getattr(model, name), getattr(standard, name)
        if value != needed:
            raise UserError(
                f"model.weights is coco, which torchvision has for model.{name} {needed}, not {value}: "
                f"set --model.{name} {str(needed).replace(' ', '')}, or choose other weights"
            )
    if len(model.anchor_ratios) != len(standard.anchor_ratios):
        raise UserError(
            f"model.weights is coco, which torchvision has for {len(standard.anchor_ratios)} model.anchor_ratios, "
            f"not {len(model.anchor_ratios)}"
        )


def _download(weights: Any, name: str) -> dict[str, Tensor]:
    """The state dict of a torchvision weights enum, by way of torch's cache."""
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # of the network, of the hash, or of a damaged file in the cache
        raise UserError(
            f"model.weights {name}: {weights.url} cannot be downloaded or read ({_reason(error)}): "
            f"give the path of a copy (--model.weights), put it into {torch.hub.get_dir()}/checkpoints, "
            "or use --model.weights none"
        ) from error
    return state


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _layers(names: Iterable[str], most: int = 4) -> str:
    """Tensor names as the layers they belong to: `roi_heads.box_predictor.cls_score, ...`."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    more = f" and {counted(len(layers) - most, 'more layer')}" if len(layers) > most else ""
    return ", ".join(layers[:most]) + more
