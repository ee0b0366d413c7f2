"""Saving, loading and choosing checkpoints."""

import contextlib
import json
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from shards.common.errors import UserError
from shards.storage.location import Location
from tests.support import CATEGORIES
from trainer.config.settings import Config
from trainer.model.checkpoint import (
    CheckpointError,
    State,
    check_same_run,
    load,
    load_newest,
    open_checkpoint,
    save,
    steps_of,
)

ORDER = {"seed": 0, "batch_size": 2, "index": "abc"}


def trained(steps: int = 2) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1))
    network[2].weight.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in network.parameters() if p.requires_grad], lr=0.1, momentum=0.9)
    for _ in range(steps):
        network(torch.randn(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return network, optimizer


def state(step: int, **changes: Any) -> State:
    network, optimizer = trained()
    weights = {name: value + step for name, value in network.state_dict().items()}
    return replace(State(step, 2 * step, ORDER, CATEGORIES, Config(), weights, optimizer.state_dict()), **changes)


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.slow)])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Location:
    if request.param == "s3":
        return Location(f"s3://{request.getfixturevalue('bucket')}/runs/one")
    return Location(str(tmp_path / "run") if request.param == "local" else f"memory://{tmp_path.name}/run")


def newest(run: Location) -> tuple[Location, Any]:
    found = load_newest(run)
    assert found is not None
    return found


def flip_a_byte(location: Location) -> None:
    data = bytearray(location.read())
    data[len(data) // 2] ^= 1
    location.write(bytes(data))


def test_a_loaded_checkpoint_continues_to_the_bit(run: Location) -> None:
    network, optimizer = trained(3)
    assert load_newest(run) is None
    save(run, state(3, weights=network.state_dict(), optimizer=optimizer.state_dict()), keep=2)
    folder, loaded = newest(run)
    assert folder.url == f"{run}/checkpoints/step-000003"
    files = {str(name).rpartition("/")[2] for name in run.fs.find(folder.path)}
    assert files == {"model.safetensors", "optimizer.safetensors", "state.json"}
    assert (loaded.step, loaded.position, loaded.order, loaded.categories) == (3, 6, ORDER, CATEGORIES)
    assert loaded.config == Config()

    other, other_optimizer = trained(0)
    other.load_state_dict(loaded.weights, strict=True)
    other_optimizer.load_state_dict(loaded.optimizer)
    batch = torch.randn(2, 3, 8, 8)
    for net, opt in ((network, optimizer), (other, other_optimizer)):
        net(batch).square().sum().backward()
        opt.step()
    for name, value in network.state_dict().items():
        assert torch.equal(value, other.state_dict()[name]), name


def test_save_keeps_the_newest_and_a_folder_without_state_json_is_no_checkpoint(run: Location) -> None:
    for step in (5, 10, 15, 20):
        save(run, state(step), keep=2)
    assert steps_of(run) == [15, 20]
    # Only files count: some object stores remove empty folders later.
    files = run.fs.find((run / "checkpoints").path)
    assert {str(name).split("/")[-2] for name in files} == {"step-000015", "step-000020"}
    (run / "checkpoints/step-000020/state.json").delete()
    assert steps_of(run) == [15]
    assert newest(run)[1].step == 15
    save(run, state(20), keep=1)
    assert steps_of(run) == [20]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
def test_load_newest_skips_a_damaged_checkpoint(tmp_path: Path, name: str, caplog: pytest.LogCaptureFixture) -> None:
    run = Location(str(tmp_path))
    for step in (5, 10):
        save(run, state(step), keep=2)
    damaged = run / f"checkpoints/step-000010/{name}"
    if name == "state.json":
        damaged.write(damaged.read()[:-20])
    else:
        flip_a_byte(damaged)
    with caplog.at_level(logging.WARNING):
        assert newest(run)[1].step == 5
    assert "step-000010" in caplog.text
    assert "damaged" in caplog.text
    with pytest.raises(CheckpointError, match="damaged"):
        load(run / "checkpoints/step-000010")
    damaged.delete()
    assert newest(run)[1].step == 5
    (run / "checkpoints/step-000005/model.safetensors").write(b"")
    if name != "state.json":
        with pytest.raises(CheckpointError, match="each of the 2 checkpoints is damaged"):
            load_newest(run)


def test_a_changed_bit_of_state_json_is_never_loaded(tmp_path: Path) -> None:
    run = Location(str(tmp_path))
    wanted = load(save(run, state(5), keep=1), optimizer=False)
    place = tmp_path / "checkpoints/step-000005/state.json"
    whole, rng = place.read_bytes(), np.random.default_rng(0)
    for number in rng.choice(len(whole) * 8, 150, replace=False).tolist():
        data = bytearray(whole)
        data[number // 8] ^= 1 << number % 8
        place.write_bytes(data)
        with contextlib.suppress(CheckpointError):
            found = load(run / "checkpoints/step-000005", optimizer=False)
            # White space, and the case of \u00FC, carry no value.
            assert replace(found, weights={}) == replace(wanted, weights={}), whole[number // 8 - 20 : number // 8 + 20]


@pytest.mark.parametrize(
    "damage",
    [
        lambda value: {**value, "step": 6},
        lambda value: {**value, "files": {}},
        lambda value: [value],
        lambda value: {"sha256": None},
    ],
)
def test_whatever_is_wrong_with_state_json_it_is_passed_over(tmp_path: Path, damage: Callable[[Any], Any]) -> None:
    run = Location(str(tmp_path))
    for step in (5, 10):
        save(run, state(step), keep=2)
    place = tmp_path / "checkpoints/step-000010/state.json"
    place.write_text(json.dumps(damage(json.loads(place.read_text()))))
    assert newest(run)[1].step == 5
    place.write_text("[" * 100_000)
    assert newest(run)[1].step == 5


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, ""),  # as releases before wrote it
        ({"files": {"model.safetensors": 3}}, "damaged"),
        ({"position": float("inf")}, "damaged"),
        ({"scaler": 7}, "damaged"),
        ({"optimizer": []}, "damaged"),
        ({"config": {"optim": {"lr": "high"}}}, "damaged, or of another release"),
    ],
)
def test_a_checkpoint_without_its_own_sha256_is_read(tmp_path: Path, changes: dict[str, Any], reason: str) -> None:
    run = Location(str(tmp_path))
    save(run, state(5), keep=1)
    place = tmp_path / "checkpoints/step-000005/state.json"
    value = json.loads(place.read_text())
    del value["sha256"]
    place.write_text(json.dumps({**value, **changes}))
    if not reason:
        assert newest(run)[1].step == 5
        return
    with pytest.raises(CheckpointError, match=reason):
        load(run / "checkpoints/step-000005")


def test_another_run_is_refused_with_all_options_that_differ_and_both_values() -> None:
    before, config = state(0), Config()
    config.run.dir, config.model.backbone, config.data.classes = "/runs/a", "resnet18", ["Car"]
    with pytest.raises(CheckpointError) as caught:
        check_same_run(before, config, {**ORDER, "index": "def", "batch_size": 4}, CATEGORIES)
    assert str(caught.value) == (
        "/runs/a: this run was started with data.classes [], now it is ['Car']; "
        "with model.backbone 'resnet50', now it is 'resnet18'; "
        "with data.batch_size 2, now it is 4: start it as before, or give another --run.dir"
    )
    with pytest.raises(CheckpointError, match=r"with another dataset at data.shards '', which was built again: start"):
        check_same_run(before, Config(), {**ORDER, "index": "def"}, CATEGORIES)
    check_same_run(before, Config(), ORDER, CATEGORIES)


def test_save_keeps_what_it_wrote_even_before_a_later_damaged_checkpoint(tmp_path: Path) -> None:
    run = Location(str(tmp_path))
    save(run, state(10), keep=1)
    flip_a_byte(run / "checkpoints/step-000010/model.safetensors")
    save(run, state(5), keep=1)
    assert steps_of(run) == [5, 10]
    save(run, state(10), keep=1)
    assert steps_of(run) == [10]
    assert load(run / "checkpoints/step-000010").step == 10


def test_open_checkpoint_takes_a_run_or_one_checkpoint(tmp_path: Path) -> None:
    run = Location(str(tmp_path / "run"))
    for step in (5, 10):
        save(run, state(step), keep=2)
    assert open_checkpoint(str(tmp_path / "run")).step == 10
    assert open_checkpoint(str(tmp_path / "run/checkpoints/step-000005")).step == 5
    assert open_checkpoint(str(tmp_path / "run")).optimizer is None
    with pytest.raises(CheckpointError, match="there is no checkpoint: give a run's folder"):
        open_checkpoint(str(tmp_path))
    (tmp_path / "state.json").write_text('{"format": "maskstream-checkpoint", "version": 99}')
    with pytest.raises(UserError, match="not a checkpoint of this release"):
        open_checkpoint(str(tmp_path))
