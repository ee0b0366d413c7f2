"""Starting weights from torchvision's downloads, checkpoints, files and URLs, with a report of what was loaded.

Norms that were trained with another epsilon than `model.norm_eps` are converted: their weight is multiplied by
sqrt((var + eps of the network) / (var + eps of the source)), which keeps their output up to float precision.
torchvision's first COCO weights need an epsilon of 0, for which torchvision changes the network; MobileNetV3's need
0.001, which torchvision's detectors ignore. After conversion, all weights work in a network with torchvision's default
of 1e-5.
"""

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
from shards.common.text import counted, shown
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

DEFAULT_EPS = 1e-5
CLASSIFIER_EPS = {"mobilenet_v3_large": 1e-3}  # with which torchvision builds and trained the classifier
COCO = {  # by `model.version`, with the epsilon of its norms
    "v1": (MaskRCNN_ResNet50_FPN_Weights.COCO_V1, 0.0),
    "v2": (MaskRCNN_ResNet50_FPN_V2_Weights.COCO_V1, DEFAULT_EPS),
}

# torchvision renamed these layers in 0.14; its published weights still have the old names.
RENAMED = (
    (re.compile(r"(fpn\.(?:inner|layer)_blocks\.\d+)\.(weight|bias)$"), r"\1.0.\2"),
    (re.compile(r"(rpn\.head\.conv)\.(weight|bias)$"), r"\1.0.0.\2"),
    (re.compile(r"(mask_head)\.mask_fcn(\d+)\.(weight|bias)$"), lambda m: f"{m[1]}.{int(m[2]) - 1}.0.{m[3]}"),
    (re.compile(r"^module\."), ""),  # saved from within DistributedDataParallel
)


@dataclass(frozen=True)
class Source:
    """Weights as they were found: tensors by name.

    Attributes:
        name: none, imagenet, coco, or the path or URL.
        classes: names by id of the classes that the class-specific layers were trained for; None if unknown.
        eps: epsilon of its norms; None if unknown.
    """

    name: str
    state: Mapping[str, Tensor]
    classes: Mapping[int, str] | None = None
    eps: float | None = None


@dataclass(frozen=True)
class LoadReport:
    """What `load_weights` did, as names in the network's `state_dict` (without batch counters of norms).

    Attributes:
        source: none, imagenet, coco, or the path or URL.
        loaded: tensors from the source.
        missing: tensors of the network that keep their initial values.
        left_out: tensors of the source of another name or shape, or for other classes.
        remark: why the class-specific layers were loaded or not; empty if the source has none, or the same classes.
    """

    source: str
    loaded: tuple[str, ...] = ()
    missing: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    remark: str = ""

    def __str__(self) -> str:
        """Summarise the report in one line per part of the network."""
        total = len(self.loaded) + len(self.missing)
        lines = [f"weights {self.source}: {len(self.loaded)} of {counted(total, 'tensor')} loaded"]
        for part in PARTS:
            loaded, missing = ([n for n in names if n.startswith(f"{part}.")] for names in (self.loaded, self.missing))
            if loaded or missing:
                kept = f", initial values in {_layers(missing)}" if loaded and missing else ""
                lines.append(f"  {part:<25}{len(loaded):>4} of {len(loaded) + len(missing)}{kept}")
        statistics = [name for name in self.left_out if name.endswith((".running_mean", ".running_var"))]
        norms = f"the statistics of {counted(len(statistics) // 2, 'batch norm')}" if statistics else ""
        others = _layers(name for name in self.left_out if name not in set(statistics))
        lines += [f"  not loaded from the source: {what}" for what in (norms, others) if what]
        return "\n".join([*lines, f"  {self.remark}"] if self.remark else lines)


def load_weights(network: MaskRCNN, model: ModelConfig, categories: Sequence[Category]) -> LoadReport:
    """Load the weights that `model.weights` names into a network; UserError if they do not fit it at all.

    A tensor is loaded if its name and shape agree. The class-specific layers (box classifier and regressor, mask
    logits) are loaded only for the same classes: compared by name if the source has names, else by number.

    `model.weights` is `none`; `imagenet` (torchvision's weights of the backbone); `coco` (torchvision's weights of Mask
    R-CNN with resnet50); a run's folder or a checkpoint; or the path or URL of a safetensors or torch file with a
    `state_dict` of a Mask R-CNN, or of a classifier for the backbone.
    """
    if model.weights == "none":
        report = LoadReport("none", missing=tuple(_by_current_name(network.state_dict())))
    else:
        report = _load(network, model, _find(model), categories)
    norms = {name for name, module in network.named_modules() if isinstance(module, FrozenBatchNorm2d)}
    bare = [name for name in report.missing if name.removesuffix(".running_var") in norms]
    if bare:
        raise UserError(
            f"model.norm is frozen, and model.weights {report.source} has no statistics for {len(bare)} of its "
            f"{len(norms)} norms ({_layers(bare)}): set --model.norm batch or group, or start from other weights"
        )
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
    is_local_file = place.is_local and os.path.isfile(place.path)
    if is_local_file or posixpath.splitext(_path(place))[1] in FILE_SUFFIXES:
        return _from_file(place)
    try:
        state = open_checkpoint(place.url)
    except NoCheckpointError:
        return _from_file(place)
    classes = {category.id: category.name for category in state.categories}
    return Source(f"{place}, step {state.step}", state.weights, classes, state.config.model.norm_eps)


def _load(network: MaskRCNN, model: ModelConfig, source: Source, categories: Sequence[Category]) -> LoadReport:
    own = _by_current_name(network.state_dict())
    found, eps = _by_current_name(source.state), source.eps
    if not any(name in own for name in found):  # perhaps a classifier
        found = {BODY + name.removeprefix("features."): value for name, value in found.items()}
        eps = CLASSIFIER_EPS.get(model.backbone, DEFAULT_EPS)
    remark, excluded = "", tuple[str, ...]()
    if any(name.startswith(CLASS_SPECIFIC) for name in found):
        if source.classes is None:
            remark = "the source does not name its classes: their layers were loaded if the number of classes agrees"
        else:
            remark = _class_difference(source.classes, categories)
            excluded = CLASS_SPECIFIC if remark else ()
    loaded = {
        name: value
        for name, value in found.items()
        if name in own and own[name].shape == value.shape and not name.startswith(excluded)
    }
    if not loaded:
        raise UserError(
            f"model.weights {source.name}: none of its {len(source.state)} tensors has the name and shape of one in "
            f"this network (the first is {next(iter(source.state), 'missing')!r}): is it a Mask R-CNN with the same "
            "backbone and widths, or a classifier of model.backbone's kind?"
        )
    network.load_state_dict(with_eps(loaded, model.norm_eps if eps is None else eps, model.norm_eps), strict=False)
    return LoadReport(
        source.name,
        tuple(loaded),
        tuple(name for name in own if name not in loaded),
        tuple(name for name in found if name not in loaded),
        remark,
    )


def with_eps(state: Mapping[str, Tensor], old: float, new: float) -> dict[str, Tensor]:
    """Convert norms, found by their `running_var`, from the epsilon `old` to `new`: new weights, the same output."""
    converted = dict(state)
    for name, variance in state.items():
        weight = f"{name.removesuffix('running_var')}weight"
        if old != new and name.endswith(".running_var") and weight in state:
            factor = ((variance.double() + new) / (variance.double() + old)).sqrt()
            converted[weight] = (state[weight].double() * factor).to(state[weight].dtype)
    return converted


def _from_file(place: Location) -> Source:
    try:
        data = place.read()
    except StorageError as error:
        raise UserError(
            f"model.weights is none, imagenet, coco, a run folder, or the path or URL of a state dict: {error}"
        ) from error
    source = Source(str(place), _read_state(data, str(place)))
    for weights, eps in COCO.values():
        # The name of torchvision's file contains its hash, so a copy is recognised by its name.
        if posixpath.basename(_path(place)) == posixpath.basename(weights.url):
            return replace(source, classes=_coco_classes(weights), eps=eps)
    try:
        description = _description(data)
        if description is None:
            return source
        classes = {int(entry["id"]): str(entry["name"]) for entry in description["categories"]}
        eps = float(description["model"]["norm_eps"])
        if not 0 <= eps < 1:
            raise ValueError(f"norm_eps is {eps}")
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise UserError(
            f"model.weights {place}: its metadata {DESCRIPTION!r} does not describe a network ({shown(error)}): save "
            "the tensors without it, or take the file of a checkpoint"
        ) from error
    return replace(source, classes=classes, eps=eps)


def _path(place: Location) -> str:
    """Return the URL without the query of a signed link (https://host/weights.pth?signature=...)."""
    return place.url.partition("?")[0] if place.protocol in ("http", "https") else place.url


def _read_state(data: bytes, name: str) -> dict[str, Tensor]:
    try:
        # A safetensors file is a length of eight bytes and a JSON object; a torch file is a zip (formerly a pickle).
        if data[8:9] == b"{":
            state: Any = safetensors.torch.load(data)
        elif data[:2] == b"PK" or data[:1] == b"\x80":
            # torchvision's reference scripts save their command-line arguments too, which are harmless.
            with torch.serialization.safe_globals([argparse.Namespace]):
                state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        else:
            raise ValueError("its first bytes are of neither format")
    except pickle.UnpicklingError as error:
        raise UserError(
            f"model.weights {name}: contains Python objects besides tensors, or is damaged: it is not loaded, because "
            "such a file could run code; save its state dict alone (torch.save(model.state_dict(), path))"
        ) from error
    except Exception as error:  # a damaged file can raise any error, such as KeyError or IndexError
        raise UserError(
            f"model.weights {name}: cannot be read as a safetensors or torch file: {_reason(error)}"
        ) from error
    for key in ("model", "state_dict"):  # checkpoints of torchvision's reference scripts, and of others
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not isinstance(state, dict) or not all(isinstance(value, Tensor) for value in state.values()):
        raise UserError(f"model.weights {name}: contains {type(state).__name__}, not a state dict of names and tensors")
    return state


def _description(data: bytes) -> dict[str, Any] | None:
    """Return the classes and settings in the metadata of a checkpoint's model.safetensors; None for other files."""
    if data[8:9] != b"{":
        return None
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    text = header.get("__metadata__", {}).get(DESCRIPTION)
    return json.loads(text) if text else None


def _by_current_name(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Rename tensors to torchvision's current names, and drop the counters of batch norms, which are never read."""
    renamed = {}
    for name, value in state.items():
        for pattern, replacement in RENAMED:
            name = pattern.sub(replacement, name)
        if not name.endswith("num_batches_tracked"):
            renamed[name] = value
    return renamed


def _class_difference(classes: Mapping[int, str], categories: Sequence[Category]) -> str:
    """Describe how the source's classes differ from `categories`, if they do; case is ignored (COCO has `person`)."""
    for category in categories:
        name = classes.get(category.id, "missing")
        if name.casefold() != category.name.casefold():
            return (
                f"the classes differ (class {category.id} is {category.name!r} here and {name!r} there): "
                "box classifier, box regressor and mask logits start from random values"
            )
    return ""


def _coco_classes(weights: Any) -> dict[int, str]:
    return dict(enumerate(weights.meta["categories"]))


def _check_fits_coco(model: ModelConfig) -> None:
    standard = ModelConfig()
    for name in ("backbone", "fpn_channels", "box_head_features", "mask_head_channels"):
        value, needed = getattr(model, name), getattr(standard, name)
        if value != needed:
            raise UserError(
                f"model.weights coco is available for model.{name} {needed} only, not {value}: "
                f"set --model.{name} {str(needed).replace(' ', '')}, or choose other weights"
            )
    if len(model.anchor_ratios) != len(standard.anchor_ratios):
        raise UserError(
            f"model.weights coco is available for {len(standard.anchor_ratios)} model.anchor_ratios only, "
            f"not {len(model.anchor_ratios)}"
        )


def _download(weights: Any, name: str) -> dict[str, Tensor]:
    """Return the state dict of a torchvision weights enum, from torch's cache if it is there."""
    try:
        state: dict[str, Tensor] = weights.get_state_dict(progress=False, check_hash=True, weights_only=True)
    except Exception as error:  # from the network, the hash, or a damaged file in the cache
        raise UserError(
            f"model.weights {name}: {weights.url} cannot be downloaded or read ({_reason(error)}): "
            f"give the path of a copy (--model.weights), copy it to {torch.hub.get_dir()}/checkpoints, "
            "or use --model.weights none"
        ) from error
    return state


def _reason(error: Exception) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__


def _layers(names: Iterable[str], most: int = 4) -> str:
    """List the layers that tensors belong to: `roi_heads.box_predictor.cls_score, ...`."""
    layers = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
    more = f" and {counted(len(layers) - most, 'more layer')}" if len(layers) > most else ""
    return ", ".join(layers[:most]) + more
