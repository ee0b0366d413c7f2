"""Checkpoints of a run on any fsspec URL, complete or not there.

    <run>/checkpoints/step-000100/
        model.safetensors       the network's state_dict, which loads into stock torchvision with strict=True; its
                                metadata names the classes and the settings of the network
        raw.safetensors         with train.ema: the weights that training resumes from; model.safetensors has their
                                average
        optimizer.safetensors   the optimizer's tensors, "<parameter number>.<name>"
        state.json              everything else, the sha256 of the other files, and that of its own values. Written
                                last: a folder without it is not a checkpoint
    <run>/best/step-000080/     the weights with the highest mask AP so far: model.safetensors and state.json

Nothing is pickled. If the newest checkpoint is damaged, the previous one is used.
"""

import hashlib
import json
import logging
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from shards.commands.options import ConfigError, update
from shards.common.errors import StorageError, UserError
from shards.common.redact import redact_values
from shards.common.text import counted, one_line, shown
from shards.format.dataset import Category
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from trainer.config.schedule import stage_of
from trainer.config.settings import Config

FOLDER = "checkpoints"
BEST = "best"
STEP_FOLDER = r"step-(\d+)"
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RAW_FILE = "raw.safetensors"
FORMAT = "maskstream-checkpoint"
VERSION = 1
DESCRIPTION = "maskstream"  # the entry of model.safetensors' metadata that describes the network

log = logging.getLogger("trainer.model.checkpoint")

# The options that determine the order, by the names in `Order.identity`.
ORDER_OPTIONS = {
    "seed": "train.seed",
    "batch_size": "data.batch_size",
    "lanes": "data.lanes",
    "window": "data.window",
    "group_by_aspect": "data.group_by_aspect",
    "repeat_threshold": "data.repeat_threshold",
}
SELECTION = ("shards", "split", "classes", "fraction")  # the options of `data` that choose samples
MOST_SHOWN = 5  # options in the message about another run


class CheckpointError(UserError):
    """A checkpoint is missing, damaged, or of another run."""


class NoCheckpointError(CheckpointError):
    """There is no checkpoint at the given place."""


@dataclass(frozen=True)
class State:
    """The state of a run after `step` steps.

    Attributes:
        position: global batches consumed, by all ranks together.
        order: the identity of the order (`Order.identity`) that `position` refers to.
        categories: the classes of the network.
        config: all settings; the model section rebuilds the network.
        weights: the network's state_dict; with train.ema the average.
        optimizer: the optimizer's state_dict; None if it was not loaded or not saved.
        raw: with train.ema, the state_dict that training resumes from.
        skipped: steps without an update, because a loss was not finite.
        step_version: `trainer.step.trainable.VERSION` of the code that trained; 1 for all before it was recorded.
        scaler: the state_dict of the fp16 gradient scaler, a few numbers; None for other precisions.
    """

    step: int
    position: int
    order: dict[str, Any]
    categories: tuple[Category, ...]
    config: Config
    weights: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    raw: dict[str, Tensor] | None = None
    skipped: int = 0
    scaler: dict[str, float] | None = None
    step_version: int = 1


def step_folder(run: Location, step: int, folder: str = FOLDER) -> Location:
    """Return the folder of the checkpoint after `step` steps, in the subfolder FOLDER or BEST of the run."""
    return run / folder / f"step-{step:06d}"


def steps_of(run: Location, folder: str = FOLDER) -> list[int]:
    """Return the steps of a run's finished checkpoints, ascending; empty if there are none."""
    return [
        step for step in numbers_in(run / folder, STEP_FOLDER) if (step_folder(run, step, folder) / STATE_FILE).exists()
    ]


def save(run: Location, state: State, keep: int, folder: str = FOLDER) -> Location:
    """Write a checkpoint, then remove all but the newest `keep`, and return its folder.

    A crash leaves the older checkpoints complete, and at worst a folder without state.json, which is not a checkpoint.
    Training resumes only from a checkpoint with `state.optimizer`.
    """
    place = step_folder(run, state.step, folder)
    # If this step is saved again, after a damaged checkpoint, old and new files must not be mixed.
    (place / STATE_FILE).delete()
    tensors, structure = flatten_optimizer(state.optimizer or {})
    files = {MODEL_FILE: _to_bytes(state.weights, **{DESCRIPTION: json.dumps(description(state))})}
    if state.optimizer is not None:
        files[OPTIMIZER_FILE] = _to_bytes(tensors)
    if state.raw is not None:
        files[RAW_FILE] = _to_bytes(state.raw)
    for name, content in files.items():
        (place / name).write(content)
    value = {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "position": state.position,
        "skipped": state.skipped,
        "step_version": state.step_version,
        "scaler": state.scaler,
        "order": state.order,
        "categories": [asdict(category) for category in state.categories],
        "config": redact_values(state.config.to_dict()),
        "optimizer": structure,
        "files": {name: {"nbytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()},
    }
    (place / STATE_FILE).write(json.dumps({**value, "sha256": _digest(value)}, indent=1).encode("utf-8"))
    _remove_older(run, state.step, keep, folder)
    return place


def description(state: State) -> dict[str, Any]:
    """Return the classes and settings that rebuild a network from its weights alone, JSON-serialisable."""
    data = state.config.data
    return {
        "categories": [asdict(category) for category in state.categories],
        "model": redact_values(asdict(state.config.model)),  # model.weights may be a URL with credentials
        "data": {"min_size": data.min_size, "max_size": data.max_size},
    }


def load(folder: Location, *, optimizer: bool = True) -> State:
    """Read one checkpoint; without `optimizer` only what inference needs. CheckpointError if it is damaged."""
    place = folder / STATE_FILE
    try:
        value = json.loads(place.read())
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{place}: not JSON ({one_line(error)}): the checkpoint is damaged") from error
    if isinstance(value, dict) and "sha256" in value and value.pop("sha256") != _digest(value):  # old ones have none
        raise CheckpointError(f"{place}: its sha256 is not that of its values: the checkpoint is damaged")
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise CheckpointError(f"{place}: not a checkpoint of this release ({FORMAT} version {VERSION})")
    files, config = value.get("files", {}), Config()
    try:
        update(config, value["config"], str(place))
        return State(
            step=int(value["step"]),
            position=int(value["position"]),
            order=dict(value["order"]),
            categories=tuple(Category(**category) for category in value["categories"]),
            config=config,
            weights=_read_tensors(folder, MODEL_FILE, files),
            optimizer=unflatten_optimizer(_read_tensors(folder, OPTIMIZER_FILE, files), value["optimizer"])
            if optimizer and OPTIMIZER_FILE in files
            else None,
            raw=_read_tensors(folder, RAW_FILE, files) if optimizer and RAW_FILE in files else None,
            skipped=int(value["skipped"]),
            step_version=int(value.get("step_version", 1)),
            scaler=dict(value["scaler"]) if value.get("scaler") else None,
        )
    except ConfigError as error:
        raise CheckpointError(f"{error}: the checkpoint is damaged, or of another release") from error
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the checkpoint is damaged ({shown(error)})") from error


def _digest(value: dict[str, Any]) -> str:
    """Return the sha256, in hex, of the values of a state.json, in whatever order and with whatever spaces."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def load_newest(run: Location, *, optimizer: bool = True, folder: str = FOLDER) -> tuple[Location, State] | None:
    """Return the newest intact checkpoint of a run, with its folder; CheckpointError if it only has damaged ones."""
    steps = steps_of(run, folder)
    for step in reversed(steps):
        place = step_folder(run, step, folder)
        try:
            return place, load(place, optimizer=optimizer)
        except CheckpointError as error:
            log.warning("%s: trying the previous checkpoint", error)
    if steps:
        which = f"each of the {len(steps)} checkpoints is" if len(steps) > 1 else "the only checkpoint is"
        raise CheckpointError(f"{run / folder}: {which} damaged: start a new run")
    return None


def open_checkpoint(url: str) -> State:
    """Read the weights of a run's newest checkpoint, of its subfolder `best`, or of the folder of one checkpoint.

    Raises:
        NoCheckpointError: there is no checkpoint.
        CheckpointError: the checkpoint is damaged.
    """
    return _open(Location(url), optimizer=False)[1]


def find(run: Location, resume: str) -> tuple[Location, State] | None:
    """Choose the checkpoint that a run resumes from: its own newest if it has one, else the one that `resume` names.

    The setting `resume` is empty, `last`, or a place as for `open_checkpoint`. The result is None for a new run.

    Raises:
        CheckpointError: `last` without a checkpoint, a place without one that has an optimizer, or a checkpoint of this
            run that is not its newest.
    """
    newest = load_newest(run)
    if resume == "last" and newest is None:
        raise CheckpointError(f"{run}: there is no checkpoint to resume: leave --resume out to begin")
    if resume in ("", "last"):
        return newest
    folder, state = _open(Location(resume), optimizer=True)
    if state.optimizer is None:
        raise CheckpointError(
            f"{folder}: contains weights only: start from them with --model.weights instead of --resume"
        )
    if newest is None:
        return folder, state
    if folder.url.startswith(f"{run}/") and folder != newest[0]:
        raise CheckpointError(
            f"{run}: has continued beyond {folder} to step {newest[1].step}: give another --run.dir to branch off there"
        )
    return newest


def _open(place: Location, *, optimizer: bool) -> tuple[Location, State]:
    if (place / STATE_FILE).exists():
        return place, load(place, optimizer=optimizer)
    newest = load_newest(place, optimizer=optimizer)
    parent, _, name = place.url.rpartition("/")
    if newest is None and parent:
        newest = load_newest(replace(place, url=parent), optimizer=optimizer, folder=name)
    if newest is not None:
        return newest
    raise NoCheckpointError(
        f"{place}: there is no checkpoint: give a run's folder (it has {FOLDER}/) or a folder with {STATE_FILE}"
    )


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Split an optimizer's state_dict into named tensors and JSON values."""
    tensors: dict[str, Tensor] = {}
    values: dict[str, dict[str, Any]] = {}
    for number, entries in state.get("state", {}).items():
        for name, value in entries.items():
            if isinstance(value, Tensor):
                tensors[f"{number}.{name}"] = value
            else:
                values.setdefault(str(number), {})[name] = value
    return tensors, {"values": values, "param_groups": state.get("param_groups", [])}


def unflatten_optimizer(tensors: dict[str, Tensor], structure: dict[str, Any]) -> dict[str, Any]:
    """Rebuild the state_dict that `flatten_optimizer` split."""
    state: dict[int, dict[str, Any]] = {int(number): dict(v) for number, v in structure["values"].items()}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    return {"state": state, "param_groups": structure["param_groups"]}


def check_same_run(state: State, config: Config, order: dict[str, Any], categories: Sequence[Category]) -> None:
    """Raise CheckpointError if a run cannot continue from `state`: another model, classes, or order of samples."""
    before = _identity(state.config, state.order, state.categories)
    now = _identity(config, order, categories)
    if stage_of(config.train, state.step).start < state.step:
        # Inside a stage the optimizer's state is kept: it must be the same optimizer of the same parameters.
        for identity, of, step in ((before, state.config, state.step - 1), (now, config, state.step)):
            identity[f"train.layers (at step {state.step})"] = stage_of(of.train, step).layers
            identity |= {f"optim.{key}": getattr(of.optim, key) for key in ("optimizer", "decay_norms")}
    found = {key: (before.get(key), now.get(key)) for key in {**before, **now} if before.get(key) != now.get(key)}
    texts = []
    if found.pop("index", None):  # a fingerprint, which says nothing: named by the options that choose samples
        sides = [redact_values(asdict(one.data)) for one in (state.config, config)]
        chosen = {f"data.{name}": (sides[0][name], sides[1][name]) for name in SELECTION}
        if others := {key: (was, is_now) for key, (was, is_now) in chosen.items() if was != is_now}:
            found = others | found
        else:
            texts.append(f"another dataset at data.shards {sides[1]['shards']!r}, which was built again")
    texts += [f"{key} {was!r}, now it is {is_now!r}" for key, (was, is_now) in found.items()]
    if texts:
        more = f"; and {counted(len(texts) - MOST_SHOWN, 'more option')}" if len(texts) > MOST_SHOWN else ""
        raise CheckpointError(
            f"{config.run.dir}: this run was started with {'; with '.join(texts[:MOST_SHOWN])}{more}: "
            "start it as before, or give another --run.dir"
        )


def _identity(config: Config, order: dict[str, Any], categories: Sequence[Category]) -> dict[str, Any]:
    """Return everything that must not change within a run, by the names of its options."""
    return {
        **{f"model.{key}": redact_values(value) for key, value in asdict(config.model).items()},
        "classes": {category.id: category.name for category in categories},
        **{ORDER_OPTIONS.get(key, key): value for key, value in order.items()},
    }


def numbers_in(folder: Location, pattern: str) -> list[int]:
    """Return the numbers in the names in a folder, by a pattern with a group for them, ascending; it may be missing."""
    found = (re.fullmatch(pattern, name) for name in names_in(folder))
    return sorted(int(match[1]) for match in found if match)


def names_in(folder: Location) -> list[str]:
    """Return the names of the files and folders in a folder; it may be missing."""
    with storage_errors(folder.url):
        try:
            paths = folder.fs.ls(folder.path, detail=False)
        except FileNotFoundError:
            return []
    return [str(path).rstrip("/").rpartition("/")[2] for path in paths]


def _remove_older(run: Location, newest: int, keep: int, folder: str) -> None:
    """Remove all but the last `keep` checkpoints up to step `newest`, which was just written.

    Checkpoints of later steps stay: they are damaged, and the run is about to write them again.
    """
    kept = [step for step in steps_of(run, folder) if step <= newest][-keep:]
    for step in numbers_in(run / folder, STEP_FOLDER):
        if step < newest and step not in kept:
            place = step_folder(run, step, folder)
            (place / STATE_FILE).delete()  # first, so that a half-removed folder is not a checkpoint
            place.delete(recursive=True)


def _to_bytes(tensors: dict[str, Tensor], **metadata: str) -> bytes:
    """Encode tensors as a safetensors file, which needs contiguous tensors on the CPU that share no storage."""
    copies = {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
        for name, t in tensors.items()
    }
    data: bytes = safetensors.torch.save(copies, metadata={"format": "pt", **metadata})
    return data


def _read_tensors(folder: Location, name: str, files: dict[str, Any]) -> dict[str, Tensor]:
    """Read a safetensors file and check it against the entry `name` of `files` in state.json."""
    try:
        data = (folder / name).read()
    except StorageError as error:
        raise CheckpointError(f"{folder}: the checkpoint is damaged: {error}") from error
    if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
        raise CheckpointError(
            f"{folder / name}: the checkpoint is damaged: its sha256 differs from the one in {STATE_FILE} "
            f"({len(data)} bytes, expected {files[name]['nbytes']})"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name}: the checkpoint is damaged ({error})") from error
