"""The state of a run, written whole or not at all, on any fsspec URL.

    <run>/checkpoints/step-000100/
        model.safetensors       the network's own state_dict: loads into stock torchvision with strict=True; its
                                metadata says of which classes and of which network it is
        optimizer.safetensors   the optimizer's tensors, "<parameter number>.<name>"
        state.json              everything else, and the sha256 of both files. Written last: a folder without it is no
                                checkpoint

        raw.safetensors         with train.ema: the weights that training goes on from; those in model.safetensors are
                                their average
    <run>/best/step-000080/     the weights with the highest mask AP so far: model.safetensors and state.json

Nothing is pickled. A newest checkpoint that turns out damaged is passed over for the one before.
"""

from __future__ import annotations

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

from shards.common.errors import StorageError, UserError
from shards.format.dataset import Category
from shards.order.identity import first_difference
from shards.storage.explain import storage_errors
from shards.storage.location import Location
from trainer.config.schedule import stage_of
from trainer.config.settings import Config
from trainer.config.yaml_config import from_dict

FOLDER = "checkpoints"
BEST = "best"
STATE_FILE = "state.json"
MODEL_FILE = "model.safetensors"
OPTIMIZER_FILE = "optimizer.safetensors"
RAW_FILE = "raw.safetensors"
FORMAT = "maskstream-checkpoint"
VERSION = 1
DESCRIPTION = "maskstream"  # the entry of model.safetensors' metadata that says how to rebuild the network

log = logging.getLogger("trainer.model.checkpoint")


class CheckpointError(UserError):
    """A checkpoint that is missing, damaged, or of another run."""


class NoCheckpointError(CheckpointError):
    """A place where no checkpoint lies."""


@dataclass(frozen=True)
class State:
    """A run after `step` steps.

    Attributes:
        step: steps done.
        position: global batches consumed, by all ranks together.
        order: the identity of the order (`Order.identity`) under which `position` means something.
        categories: the classes that the network tells apart.
        config: all settings; the model section rebuilds the network.
        weights: the network's state_dict, averaged where the run averages.
        optimizer: the optimizer's state_dict; None where only the weights were asked for, or are there.
        raw: the state_dict that training goes on from, where `weights` is an average.
        skipped: steps that changed nothing, because a loss was not finite.
        scaler: the state_dict of fp16's gradient scaler, a few numbers; None for other arithmetic.
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


def step_folder(run: Location, step: int, folder: str = FOLDER) -> Location:
    """Where the checkpoint after `step` steps lies."""
    return run / folder / f"step-{step:06d}"


def steps_of(run: Location, folder: str = FOLDER) -> list[int]:
    """The steps of a run's finished checkpoints, ascending; empty where there is none.

    Raises:
        StorageError: the place cannot be asked.
    """
    return [step for step in _folders(run, folder) if (step_folder(run, step, folder) / STATE_FILE).exists()]


def save(run: Location, state: State, keep: int, folder: str = FOLDER) -> Location:
    """Write a checkpoint, then remove all but the newest `keep`.

    Args:
        run: the run's folder.
        state: `state.optimizer` is needed to go on from there.
        keep: at least 1.
        folder: of the run.

    Raises:
        StorageError: it could not be written; what was there before is untouched.
    """
    place = step_folder(run, state.step, folder)
    # A step saved again (after falling back behind a damaged checkpoint) must not mix old and new files.
    (place / STATE_FILE).delete()
    tensors, structure = flatten_optimizer(state.optimizer or {})
    files = {
        MODEL_FILE: safetensors.torch.save(
            _plain(state.weights), metadata={"format": "pt", DESCRIPTION: json.dumps(_describe(state))}
        ),
    }
    if state.optimizer is not None:
        files[OPTIMIZER_FILE] = safetensors.torch.save(_plain(tensors), metadata={"format": "pt"})
    if state.raw is not None:
        files[RAW_FILE] = safetensors.torch.save(_plain(state.raw), metadata={"format": "pt"})
    for name, data in files.items():
        (place / name).write(data)
    value = {
        "format": FORMAT,
        "version": VERSION,
        "step": state.step,
        "position": state.position,
        "skipped": state.skipped,
        "scaler": state.scaler,
        "order": state.order,
        "categories": [asdict(category) for category in state.categories],
        "config": state.config.to_dict(),
        "optimizer": structure,
        "files": {name: {"nbytes": len(d), "sha256": hashlib.sha256(d).hexdigest()} for name, d in files.items()},
    }
    (place / STATE_FILE).write(json.dumps(value, indent=1).encode("utf-8"))
    _remove_older(run, state.step, keep, folder)
    return place


def load(folder: Location, *, optimizer: bool = True) -> State:
    """Read one checkpoint and check it against its hashes.

    Args:
        folder: where its state.json lies.
        optimizer: whether what training needs to go on is wanted, if it is there; without it less is read.

    Raises:
        CheckpointError: damaged, or of another format.
        StorageError: missing or unreachable.
    """
    try:
        value = json.loads((folder / STATE_FILE).read())
    except ValueError as error:
        raise CheckpointError(f"{folder / STATE_FILE}: not JSON ({error}): the checkpoint is damaged") from error
    if not isinstance(value, dict) or value.get("format") != FORMAT or value.get("version") != VERSION:
        raise CheckpointError(f"{folder / STATE_FILE}: not a checkpoint of this release ({FORMAT} version {VERSION})")
    files = value.get("files", {})
    try:
        return State(
            step=int(value["step"]),
            position=int(value["position"]),
            order=dict(value["order"]),
            categories=tuple(Category(**category) for category in value["categories"]),
            config=from_dict(value["config"], str(folder / STATE_FILE)),
            weights=_tensors(folder, MODEL_FILE, files),
            optimizer=unflatten_optimizer(_tensors(folder, OPTIMIZER_FILE, files), value["optimizer"])
            if optimizer and OPTIMIZER_FILE in files
            else None,
            raw=_tensors(folder, RAW_FILE, files) if optimizer and RAW_FILE in files else None,
            skipped=int(value["skipped"]),
            scaler=dict(value["scaler"]) if value.get("scaler") else None,
        )
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{folder}: the checkpoint is damaged ({error!r})") from error


def load_newest(run: Location, *, optimizer: bool = True, folder: str = FOLDER) -> tuple[Location, State] | None:
    """The newest intact checkpoint of a run with its folder; None where the run has none.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
        StorageError: the place cannot be reached.
    """
    steps = steps_of(run, folder)
    for step in reversed(steps):
        place = step_folder(run, step, folder)
        try:
            return place, load(place, optimizer=optimizer)
        except CheckpointError as error:
            log.warning("%s: passing over it for the one before", error)
    if steps:
        told = f"each of the {len(steps)} checkpoints is" if len(steps) > 1 else "the only checkpoint is"
        raise CheckpointError(f"{run / folder}: {told} damaged: start a new run")
    return None


def open_checkpoint(url: str) -> State:
    """What `--checkpoint` names, weights only: a run's folder (its newest checkpoint), the folder `best` in it, or the
    folder of one checkpoint.

    Raises:
        NoCheckpointError: there is none.
        CheckpointError: it is damaged.
    """
    return _open(Location(url), optimizer=False)[1]


def find(run: Location, resume: str) -> tuple[Location, State] | None:
    """Where a run goes on, with the folder: from its own newest checkpoint if it has one, else from what `run.resume`
    names; None for a run that begins.

    Raises:
        CheckpointError: `resume` is `last` and there is no checkpoint; it names none; or it names one of this run that
            is not its newest.
    """
    newest = load_newest(run)
    if resume == "last" and newest is None:
        raise CheckpointError(f"{run}: there is no checkpoint to resume: leave --resume out to begin")
    if resume in ("", "last"):
        return newest
    named = _open(Location(resume), optimizer=True)
    if named[1].optimizer is None:
        raise CheckpointError(f"{named[0]}: holds weights only: begin with them by --model.weights instead of --resume")
    if newest is None:
        return named
    if named[0].url.startswith(f"{run}/") and named[0] != newest[0]:
        raise CheckpointError(
            f"{run}: has gone on beyond {named[0]} to step {newest[1].step}: give another --run.dir to branch off there"
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


def _describe(state: State) -> dict[str, Any]:
    """What rebuilds the network around its weights, also where model.safetensors is all that is left."""
    data = state.config.data
    return {
        "categories": [asdict(category) for category in state.categories],
        "model": asdict(state.config.model),
        "data": {"min_size": data.min_size, "max_size": data.max_size},
    }


def flatten_optimizer(state: dict[str, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """An optimizer's state_dict as named tensors, and the rest as JSON values."""
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
    """The inverse of `flatten_optimizer`."""
    state: dict[int, dict[str, Any]] = {int(number): dict(v) for number, v in structure["values"].items()}
    for key, tensor in tensors.items():
        number, _, name = key.partition(".")
        state.setdefault(int(number), {})[name] = tensor
    return {"state": state, "param_groups": structure["param_groups"]}


def check_same_run(state: State, config: Config, order: dict[str, Any], categories: Sequence[Category]) -> None:
    """Whether a run may continue from `state`: same model, same classes, same order of samples.

    Raises:
        CheckpointError: they differ; the first key that does is named with both values.
    """
    before = _decides(state.config, state.order, state.categories)
    now = _decides(config, order, categories)
    if stage_of(config.train, state.step).start < state.step:
        # Inside a stage the optimizer goes on: it must be the same, over the same parameters.
        for told, of, step in ((before, state.config, state.step - 1), (now, config, state.step)):
            told[f"train.layers (at step {state.step})"] = stage_of(of.train, step).layers
            told |= {f"optim.{key}": getattr(of.optim, key) for key in ("optimizer", "decay_norms")}
    found = first_difference(before, now)
    if found is not None:
        key, was, is_now = found
        raise CheckpointError(
            f"{config.run.dir}: this run was started with {key} {was!r}, now it is {is_now!r}: "
            "start it as before, or give another --run.dir"
        )


def _decides(config: Config, order: dict[str, Any], categories: Sequence[Category]) -> dict[str, Any]:
    """All that must stay as it was, by the names under which a user finds it."""
    return {
        **{f"model.{key}": value for key, value in asdict(config.model).items()},
        "classes": {category.id: category.name for category in categories},
        **{ORDER_OPTIONS.get(key, key): value for key, value in order.items()},
    }


# Where the user finds what decides the order.
ORDER_OPTIONS = {
    "seed": "train.seed",
    "batch_size": "data.batch_size",
    "lanes": "data.lanes",
    "window": "data.window",
    "group_by_aspect": "data.group_by_aspect",
    "repeat_threshold": "data.repeat_threshold",
    "index": "data.shards, data.classes or data.fraction (fingerprint of the index of what is selected)",
}


def _folders(run: Location, folder: str) -> list[int]:
    """The steps that have a folder, finished or not, ascending."""
    place = run / folder
    with storage_errors(place.url):
        try:
            names = place.fs.ls(place.path, detail=False)
        except FileNotFoundError:
            return []
    found = (re.fullmatch(r"step-(\d+)", str(name).rstrip("/").rsplit("/", 1)[-1]) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _remove_older(run: Location, newest: int, keep: int, folder: str) -> None:
    """Remove all but the last `keep` checkpoints up to `newest`, the one just written.

    One of a later step is left: it was damaged, and this run is on its way to write it again.
    """
    kept = [step for step in steps_of(run, folder) if step <= newest][-keep:]
    for step in _folders(run, folder):
        if step < newest and step not in kept:
            place = step_folder(run, step, folder)
            (place / STATE_FILE).delete()  # first: half a folder is no checkpoint
            place.delete(recursive=True)


def _plain(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous copies in main memory, as safetensors wants them; no two share storage."""
    return {
        name: torch.empty_like(t, device="cpu", memory_format=torch.contiguous_format).copy_(t)
        for name, t in tensors.items()
    }


def _tensors(folder: Location, name: str, files: dict[str, Any]) -> dict[str, Tensor]:
    try:
        data = (folder / name).read()
    except StorageError as error:
        raise CheckpointError(f"{folder}: the checkpoint is damaged: {error}") from error
    if hashlib.sha256(data).hexdigest() != files[name]["sha256"]:
        raise CheckpointError(
            f"{folder / name}: the checkpoint is damaged: its sha256 is not what {STATE_FILE} says "
            f"({len(data)} bytes, {files[name]['nbytes']} expected)"
        )
    try:
        tensors: dict[str, Tensor] = safetensors.torch.load(data)
        return tensors
    except SafetensorError as error:
        raise CheckpointError(f"{folder / name}: the checkpoint is damaged ({error})") from error
