"""Two ranks: what is the same on both, as on one, and as without an interruption."""

import json
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch

from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import evaluate, fill, predict, train
from trainer.model.checkpoint import State, flatten_optimizer, load, steps_of
from trainer.run.distributed import TIMEOUT, TRAINING_TIMEOUT

TORCH_TIMEOUT = timedelta(minutes=30)  # of gloo


def facts(folder: Path) -> list[dict[str, Any]]:
    """What each rank saw."""
    return [json.loads((folder / f"rank-{rank}.json").read_text()) for rank in (0, 1)]


def losses(run: Path) -> list[dict[str, float]]:
    rows = tiny.rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["losses"] for row in rows]


def tensors(state: State) -> dict[str, torch.Tensor]:
    assert state.raw is not None
    assert state.optimizer is not None
    parts = {"weights": state.weights, "raw": state.raw, "optimizer": flatten_optimizer(state.optimizer)[0]}
    return {f"{part} {name}": value for part, values in parts.items() for name, value in values.items()}


def test_start_accelerator_waits_longer_than_torch(two_ranks: Path) -> None:
    assert TIMEOUT > TRAINING_TIMEOUT > TORCH_TIMEOUT
    assert [own["timeout_s"] for own in facts(two_ranks)] == [TRAINING_TIMEOUT.total_seconds()] * 2


def test_main_can_write_fails_on_all_ranks(two_ranks: Path) -> None:
    file = two_ranks / "file"
    error = f"{file}: cannot be written ({file} is not a writable folder): choose another --out"
    assert [own["write_error"] for own in facts(two_ranks)] == [error] * 2
    assert not (two_ranks / "new").exists()


def test_ranks_hold_the_same_weights_in_every_stage(two_ranks: Path) -> None:
    first, second = facts(two_ranks)
    for name, stage in (("unbroken", "3"), ("sgd", "2")):
        assert first[name] == second[name]
        assert set(first[name]) == {stage, "end"}
        assert first[name][stage] != first[name]["end"]


def test_a_run_that_is_stopped_and_crashes_resumes_bit_for_bit(two_ranks: Path) -> None:
    """Rank 1 received SIGTERM in the last step of the first stage; both crashed in the second; loaders changed."""
    unbroken, broken = two_ranks / "unbroken", two_ranks / "broken"
    for own in facts(two_ranks):
        assert own["status"] == 128 + 15
        assert own["broken"] == {"end": own["unbroken"]["end"]}
    stderr = (two_ranks / "stderr").read_text()
    assert stderr.count(f"train: stopped by a signal after step 3, which is saved in {broken}") == 1
    assert f"continuing {broken} from step 3\n" in stderr
    assert f"continuing {broken} from step 4\n" in stderr
    assert steps_of(Location(str(broken))) == [2, 3, 4, 6]
    assert losses(broken) == losses(unbroken)
    assert losses(broken)[-1]["loss_mask_teacher"] > 0
    assert tiny.rows(broken / "evaluations.jsonl") == tiny.rows(unbroken / "evaluations.jsonl")
    one, other = (tensors(load(Location(str(run)) / "checkpoints/step-000006")) for run in (unbroken, broken))
    assert one.keys() == other.keys()
    assert [name for name in one if not torch.equal(one[name], other[name])] == []


def test_a_run_counts_global_batches_and_trains_the_layers_of_its_stage(two_ranks: Path) -> None:
    rows = tiny.rows(two_ranks / "unbroken" / "metrics.jsonl")
    assert [row["position"] for row in rows] == [4, 8, 12, 16, 20, 24]
    assert [row["images"] for row in rows] == [8] * 6
    run = Location(str(two_ranks / "unbroken"))
    second, third, last = (tensors(load(run / f"checkpoints/step-00000{step}")) for step in (2, 3, 6))
    body, head = "backbone.body.18.0.weight", "rpn.head.cls_logits.weight"
    assert torch.equal(second[f"raw {body}"], third[f"raw {body}"])
    assert not torch.equal(third[f"raw {body}"], last[f"raw {body}"])
    assert not torch.equal(second[f"raw {head}"], third[f"raw {head}"])
    assert not torch.equal(last[f"weights {head}"], last[f"raw {head}"])  # the average lags behind


def test_two_ranks_learn_what_one_rank_does(two_ranks: Path, tmp_path: Path) -> None:
    settings = tiny.SHORT_STAGES | {"train__accumulate": 2}  # the same two batches, one after the other
    assert train.main(tiny.arguments(two_ranks / "data", tmp_path, **settings)) == 0
    for one, two in zip(losses(tmp_path), losses(two_ranks / "sgd"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)
    own, shared = (tiny.rows(run / "metrics.jsonl") for run in (tmp_path, two_ranks / "sgd"))
    for key in ("position", "images", "lr", "samples"):
        assert [row[key] for row in own] == [row[key] for row in shared]
    # The loaders of both ranks count, not only the main rank's.
    read = [row["read_mb"] for row in shared]
    assert read == pytest.approx([row["read_mb"] for row in own], rel=1e-4)
    assert min(read) > 0
    assert all(0 < row["data_wait"] <= row["data_wait_longest"] < 1 for row in shared)


def test_two_ranks_replace_the_damaged_samples_that_one_rank_does(two_ranks: Path, tmp_path: Path) -> None:
    settings = {"train__steps_per_epoch": 3, "data__val_split": "", "data__skip_bad": 2, "train__accumulate": 2}
    assert train.main(tiny.arguments(two_ranks / "damaged", tmp_path, **settings)) == 0
    own, shared = (tiny.rows(run / "metrics.jsonl") for run in (tmp_path, two_ranks / "replaced"))
    replaced = [{bad["image_id"] for bad in row.get("replaced", ())} for row in own]
    assert set.union(*replaced) == {"img0003", "img0008"}
    assert replaced == [{bad["image_id"] for bad in row.get("replaced", ())} for row in shared]
    for one, two in zip(losses(tmp_path), losses(two_ranks / "replaced"), strict=True):
        assert one == pytest.approx(two, rel=1e-3)


def test_evaluate_writes_the_same_files_on_two_ranks_as_on_one(two_ranks: Path, tmp_path: Path) -> None:
    words = ["--checkpoint", str(two_ranks / "unbroken"), "--data.workers", "0", "--batch-size", "1", "--pictures", "3"]
    assert evaluate.main([*words, "--out", str(tmp_path)]) == 0
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {path.name for path in (two_ranks / "evaluation").iterdir()}
    for name in names:
        assert (two_ranks / "evaluation" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_predict_writes_the_same_files_on_two_ranks_after_an_interruption(two_ranks: Path, tmp_path: Path) -> None:
    options = tiny.predict_options(two_ranks / "unbroken", two_ranks / "data")
    assert predict.main([*options, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "predictions.json").read_text())["annotations"]
    for name in ("predictions.json", "submission.csv"):
        assert (two_ranks / "predicted" / name).read_bytes() == (tmp_path / name).read_bytes(), name


def test_fill_writes_the_same_dataset_on_two_ranks(two_ranks: Path, tmp_path: Path) -> None:
    assert fill.main(tiny.fill_options(two_ranks / "masks", two_ranks / "data", tmp_path)) == 0
    assert json.loads((tmp_path / "dataset.json").read_text())["source"]["filled"]["masks"] > 3
    assert tiny.digests(two_ranks / "filled") == tiny.digests(tmp_path)
