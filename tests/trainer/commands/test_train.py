import csv
import io
import json
import logging
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from demo.s3server import S3Server
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.trainer import tiny
from trainer.commands import evaluate as evaluate_script
from trainer.commands import train as train_script
from trainer.config.yaml_config import load_config
from trainer.model.checkpoint import open_checkpoint
from trainer.run.distributed import tracker_folder
from trainer.run.runlog import RunLog

SCRIPT = tiny.ROOT / "trainer" / "train.py"

# Trains, then writes what this rank holds: every rank's file must be the same.
HASHING = """
import hashlib, os, sys
from pathlib import Path
from trainer.commands.train import parse, train

network = train(parse(sys.argv[2:]))
digest = hashlib.sha256()
for name, value in sorted(network.state_dict().items()):
    digest.update(name.encode() + value.cpu().numpy().tobytes())
Path(sys.argv[1], f"rank-{os.environ.get('RANK', '0')}").write_text(digest.hexdigest())
"""


def losses(run: Path) -> dict[int, dict[str, float]]:
    """The losses of each step; a step with two rows is a failure."""
    rows = tiny.rows(run / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return {row["step"]: row["losses"] for row in rows}


def test_a_wrong_argument_is_one_line_and_costs_no_torch() -> None:
    code = "import sys; from trainer.commands import train; status = train.main(sys.argv[1:]); "
    code += "assert 'torch' not in sys.modules; exit(status)"
    done = subprocess.run(
        [sys.executable, "-c", code, "--data.batchsize", "3"], env=tiny.environment(), capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr == (
        "train: error: unknown argument --data.batchsize: did you mean --data.batch_size? (see --help)\n"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data__shards": ""}, "data.shards is empty: give --data.shards"),
        ({"data__shards": "/nowhere/at/all"}, "/nowhere/at/all: there is no dataset.json"),
        ({"data__batch_size": 25}, "24 samples, fewer than one batch of 25"),
        ({"data__split": "test"}, "there is no split 'test'"),
        ({"data__val_split": "test"}, "data.val_split is 'test': the dataset has train, val"),
        ({"data__classes": "[Sqare]"}, "there is no class 'Sqare': did you mean Square?"),
        ({"data__classes": "Square"}, "data.classes: 'Square' is not a list"),
        ({"data__fraction": 0}, "fraction is 0.0: it must be above 0"),
        ({"data__fraction": 1e-6}, "no sample is selected"),
        ({"data__repeat_threshold": 2}, "data.repeat_threshold is 2.0: it must be between 0 and 1"),
        ({"optim__lr": "fast"}, "optim.lr: 'fast' is not a float"),
        ({"model__weights": "/nowhere.safetensors"}, "/nowhere.safetensors: there is no such object"),
    ],
)
def test_bad_input_is_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], message: str
) -> None:
    assert train_script.main(tiny.arguments(dataset, tmp_path / "run", **changes)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train: error: ")
    assert message in error


def test_a_run_folder_that_cannot_be_written_is_told_before_anything_is_loaded(
    s3: S3Server, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for run, told in (
        ("/proc/nowhere", "/proc/nowhere: cannot be written (/proc is not a writable folder): choose another --run."),
        ("s3://no-such-bucket/run", "--run.dir cannot be written: s3://no-such-bucket/run/.probe: the bucket does not"),
    ):
        # The weights, which are not there either, would be the next to be told of.
        assert train_script.main(tiny.arguments(dataset, Path(), run__dir=run, model__weights="/nowhere")) == 2
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"train: error: {told}")


def test_a_run_continues_where_it_stopped_and_says_when_it_is_finished(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    assert train_script.main(tiny.arguments(dataset, unbroken, train__epochs=2, train__steps_per_epoch=2)) == 0
    first = tiny.arguments(dataset, broken, train__epochs=1, train__steps_per_epoch=2)
    # Other loader processes read the same batches.
    both = tiny.arguments(dataset, broken, train__epochs=2, train__steps_per_epoch=2, data__workers=2)
    assert train_script.main(first) == 0
    assert train_script.main(both) == 0
    assert losses(broken) == losses(unbroken)
    assert [row["step"] for row in tiny.rows(broken / "evaluations.jsonl")] == [2, 4]
    before = (broken / "metrics.jsonl").read_bytes()
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert train_script.main(both) == 0
    assert "is finished (4 steps): raise train.epochs to continue it" in caplog.text
    assert (broken / "metrics.jsonl").read_bytes() == before

    # An evaluation that was cut short is made up for.
    rows = (broken / "evaluations.jsonl").read_text().splitlines(keepends=True)
    (broken / "evaluations.jsonl").write_text(rows[0] + rows[1][:20])
    assert train_script.main(both) == 0
    assert (broken / "evaluations.jsonl").read_text().splitlines(keepends=True) == rows


def test_a_run_on_a_part_of_the_dataset_keeps_to_it(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    run, short = tmp_path / "run", {"train__steps_per_epoch": 2, "train__checkpoint_steps": 2}
    part = {"data__classes": "[Disc]", "data__fraction": 0.7, "data__repeat_threshold": 0.9} | short
    with caplog.at_level(logging.INFO, logger="trainer"):
        assert train_script.main(tiny.arguments(dataset, run, **part)) == 0
    assert "training on Disc: objects of the dataset's other classes are background" in caplog.text
    state = open_checkpoint(str(run))
    assert [(category.id, category.name) for category in state.categories] == [(2, "Disc")]
    assert state.order["repeat_threshold"] == 0.9
    [rated] = tiny.rows(run / "evaluations.jsonl")
    assert rated["images"] == len(open_dataset(str(dataset)).select(classes=["Disc"]).index("val"))
    # The command that rates a checkpoint takes the same classes.
    assert evaluate_script.main(["--checkpoint", str(run), "--data.split", "val", "--data.workers", "0"]) == 0

    for change, key in (
        ({"data__fraction": 0.9}, "data.fraction"),
        ({"data__repeat_threshold": 0.5}, "data.repeat_threshold 0.9, now it is 0.5"),
        ({"data__classes": "[]"}, "classes {2: 'Disc'}, now it is"),
    ):
        assert train_script.main(tiny.arguments(dataset, run, **(part | change))) == 2
        assert key in capsys.readouterr().err.splitlines()[-1]


def test_a_run_folder_can_be_on_an_object_store(dataset: Path, tmp_path: Path) -> None:
    run = Location(f"memory://{tmp_path.name}/run")
    for epochs in (1, 2):
        changes = {"run__dir": run, "run__pictures": 2, "run__trackers": "[tensorboard]"}
        arguments = tiny.arguments(dataset, tmp_path, train__epochs=epochs, train__steps_per_epoch=2, **changes)
        assert train_script.main(arguments) == 0
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read().splitlines()]
        assert [row["step"] for row in rows] == list(range(1, 2 * epochs + 1))
        assert load_config(f"{run}/config.yaml").train.epochs == epochs
    assert open_checkpoint(run.url).step == 4
    assert open_checkpoint(f"{run}/best").step in (2, 4)
    table = list(csv.DictReader(io.StringIO((run / "metrics.csv").read().decode())))
    assert [float(row["loss_mask"]) for row in table] == [row["losses"]["loss_mask"] for row in rows]
    assert (run / "curves.png").read().startswith(b"\x89PNG")
    files = [str(name).partition("/run/")[2] for name in run.fs.find(run.path)]
    assert sum(name.startswith("tensorboard/maskstream/events.out") for name in files) == 2  # one a process
    for step in (2, 4):
        assert [name for name in files if name.startswith(f"pictures/step-{step:06d}/img10")]
    assert not Path(tracker_folder(run)).exists()


def test_a_run_folder_of_other_settings_is_refused(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    quick = {"train__steps_per_epoch": 1, "data__val_split": ""}
    assert train_script.main(tiny.arguments(dataset, run, **quick)) == 0
    files = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for changes, told in (
        ({"model__fpn_channels": 24}, "model.fpn_channels 16, now it is 24"),
        ({"data__batch_size": 3}, "data.batch_size 2, now it is 3"),
        ({"train__seed": 5}, "train.seed 0, now it is 5"),
        ({"data__shards": tiny.write_dataset(tmp_path / "other", samples=20)}, "data.shards"),
    ):
        assert train_script.main(tiny.arguments(dataset, run, **{**quick, **changes})) == 2
        error = capsys.readouterr().err.splitlines()[-1]
        assert told in error
        assert "give another --run.dir" in error
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == files


def test_a_loss_that_is_not_finite_stops_with_its_name_and_the_samples(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = tiny.arguments(dataset, tmp_path / "run", optim__lr=1e18, optim__warmup_steps=0, optim__clip_norm=0)
    assert train_script.main(arguments) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("train: error: step ")
    assert "nan" in error or "inf" in error
    assert "(samples img0" in error


@pytest.mark.slow
def test_two_ranks_stay_equal_and_a_killed_run_goes_on_as_if_unbroken(dataset: Path, tmp_path: Path) -> None:
    script = tmp_path / "hashing.py"
    script.write_text(HASHING)
    settings = {"train__steps_per_epoch": 16, "train__checkpoint_steps": 4, "data__workers": 1}

    unbroken = tmp_path / "unbroken"
    done = tiny.run(script, [str(tmp_path), *tiny.arguments(dataset, unbroken, **settings)], ranks=2)
    assert done.returncode == 0, done.stderr
    first = [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)]
    assert first[0] == first[1]

    broken = tmp_path / "broken"
    options = [str(tmp_path), *tiny.arguments(dataset, broken, **settings)]
    kill_at_step(5, broken, tiny.start(script, options, ranks=2))
    saved = [int(path.parent.name.removeprefix("step-")) for path in broken.glob("checkpoints/*/state.json")]
    assert 0 < max(saved) <= len(tiny.rows(broken / "metrics.jsonl")) < 16
    done = tiny.run(script, options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert f"continuing {broken} from step {max(saved)}" in done.stderr
    assert losses(broken) == losses(unbroken)
    assert [(tmp_path / f"rank-{rank}").read_text() for rank in (0, 1)] == first
    assert tiny.rows(broken / "evaluations.jsonl") == tiny.rows(unbroken / "evaluations.jsonl")
    assert [row["position"] for row in tiny.rows(broken / "metrics.jsonl")] == list(range(2, 33, 2))


def kill_at_step(step: int, run: Path, process: subprocess.Popen[str]) -> None:
    """SIGKILL the launcher and its ranks as soon as the step is logged."""
    metrics = run / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_bytes().count(b"\n") >= step):
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.005)
    # The launcher starts its ranks apart from itself: killing its group would leave them running.
    family = [*psutil.Process(process.pid).children(recursive=True), process]
    for member in family:
        member.send_signal(signal.SIGKILL)
    process.communicate()
    psutil.wait_procs(family[:-1])


def test_a_tracker_that_cannot_be_had_is_one_line(
    dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    for name, told in (
        ("wandb", "run.trackers: wandb is not installed: pip install wandb, or leave it out"),
        ("tensorbord", "run.trackers: accelerate does not know 'tensorbord': it knows aim, "),
    ):
        assert train_script.main(tiny.arguments(dataset, tmp_path / "run", run__trackers=f"[{name}]")) == 2
        assert told in capsys.readouterr().err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_an_error_on_all_ranks_is_told_once(dataset: Path, tmp_path: Path) -> None:
    options = tiny.arguments(dataset, tmp_path / "run", data__batch_size=13)
    done = tiny.run(SCRIPT, options, ranks=2)
    assert done.returncode != 0
    told = [line for line in done.stderr.splitlines() if line.startswith("train: error")]
    assert len(told) == 1
    assert f"traceback : {told[0]}" in done.stderr  # the end of the launcher's own report
    assert "fewer than one batch of 13 on each of 2 ranks" in told[0]
    assert not (tmp_path / "run").exists()


def test_a_run_killed_between_its_best_weights_and_their_evaluation_rates_them_again(
    dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class KilledError(BaseException):
        pass

    def killed(log: RunLog, row: dict[str, Any]) -> None:
        raise KilledError

    arguments = tiny.arguments(dataset, tmp_path / "run", train__steps_per_epoch=1)
    with monkeypatch.context() as patched:
        patched.setattr(RunLog, "add_evaluation", killed)
        with pytest.raises(KilledError):
            train_script.main(arguments)
    assert not (tmp_path / "run/evaluations.jsonl").exists() or not tiny.rows(tmp_path / "run/evaluations.jsonl")
    assert train_script.main(arguments) == 0
    [row] = tiny.rows(tmp_path / "run/evaluations.jsonl")
    assert row["step"] == open_checkpoint(str(tmp_path / "run/best")).step == 1
