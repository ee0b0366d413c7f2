import io
import json
import logging
import platform
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import numpy as np
import pytest
from accelerate import Accelerator
from PIL import Image

from shards.storage.location import Location
from trainer.config.settings import Config, DataConfig
from trainer.run.best import since_best
from trainer.run.distributed import start_accelerator
from trainer.run.run_summary import run_summary
from trainer.run.runlog import Progress, RowFile, RunLog, cpu_name
from trainer.run.trackers import wandb_options


def row(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "loss": 2.0,
        "losses": {"loss_mask": 0.5, "loss_classifier": 1.5},
        "lr": 0.01,
        "images": 8,
        "seconds": 2.0,
        "data_wait": 0.25,
        "data_wait_longest": 0.5,
        "images_per_s": 4.0,
        "memory_mb": 1500.0,
        "read_mb": 3.0,
        "retries": 0,
        "samples": 8,
        "cache_hits": 0,
        **changes,
    }


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_rows_beyond_the_step_and_a_truncated_line_are_dropped(tmp_path: Path, scheme: str) -> None:
    place = Location(f"{scheme}{tmp_path}/metrics.jsonl")
    place.write(b'{"step":1}\n{"step":2}\n{"step":3}\n{"st')
    rows = RowFile(place, 2)
    rows.append({"step": 3, "again": True})  # on a local disk it is in the file immediately
    assert place.read().startswith(b'{"step":1}\n{"step":2}\n' + (b"" if scheme else b'{"step":3,"again":true}'))
    assert (b"again" in place.read()) == (not scheme)
    rows.flush()
    expected = [{"step": 1}, {"step": 2}, {"step": 3, "again": True}]
    assert [json.loads(line) for line in place.read().splitlines()] == expected


def test_an_unreadable_cpuinfo_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "read_text", Mock(side_effect=PermissionError))
    assert cpu_name() == platform.processor()


def test_progress_logs_a_line_of_means_every_few_steps(caplog: pytest.LogCaptureFixture) -> None:
    progress = Progress(every=2, total=5)
    with caplog.at_level(logging.INFO, logger="trainer"):
        progress.add(row(1, seconds=70.0))  # waits for the loaders, and compiles
        assert caplog.messages.pop().endswith("  in 1 min 10 s")
        caplog.clear()
        progress.add(row(1))
        assert not caplog.messages
        progress.add(row(2, loss=0.8, losses={"loss_mask": 0.3, "loss_classifier": 0.5}, seconds=6.0, data_wait=0.75))
        progress.add(row(3))
        progress.add(row(4, retries=2, cache_hits=4))
        progress.add(row(5, retries=1))
    assert len(caplog.messages) == 3
    first = caplog.messages[0]
    assert first.startswith("step 2/5  loss 1.4000 (mask 0.400  classifier 1.000)")
    assert "2.0 images/s" in first  # 16 images in 8 seconds
    assert "data wait 62 % (0.8 MB/s)" in first  # 0.5 + 4.5 of 8 seconds, 6 MB in 8 seconds
    assert "memory 1.5 GB" in first
    assert "data wait 25 % (1.5 MB/s, 2 retries, 25 % from the cache)" in caplog.messages[1]
    assert "left 0:00:12" in first  # 3 steps of 4 seconds
    assert "(1.5 MB/s, 1 retry)" in caplog.messages[-1]
    assert caplog.messages[-1].endswith("left 0:00:00")


def test_progress_logs_no_reading_speed_if_nothing_was_read(caplog: pytest.LogCaptureFixture) -> None:
    """All of a small dataset may be read ahead; trackers still receive numbers."""
    progress = Progress(every=1, total=9)
    with caplog.at_level(logging.INFO, logger="trainer"):
        means = [progress.add(row(step, read_mb=read)) for step, read in enumerate((3.0, 0.0, 0.05), 1)]
        progress.add(row(4, read_mb=0.0, cache_hits=8))
    assert [one and one["read_mb_per_s"] for one in means] == [1.5, 0.0, 0.025]
    for line, text in zip(
        caplog.messages, ("25 % (1.5 MB/s)", "25 %", "25 % (25.0 kB/s)", "25 % (100 % from the cache)"), strict=True
    ):
        assert f"data wait {text}  memory" in line


@pytest.mark.parametrize(
    ("evaluations", "expected"),
    [
        ([(0.25, 0.25), (0.25, 0.25), (0.25, 0.125), (0.25, 0.5), (0.25, 0.5)], [True, False, False, True, False]),
        ([(None, None), (0.25, None), (0.125, None), (0.5, None)], [True, True, False, True]),  # without masks: box AP
    ],
)
def test_the_first_evaluation_of_the_highest_ap_is_the_best(
    tmp_path: Path, evaluations: list[tuple[float | None, float | None]], expected: list[bool]
) -> None:
    log, best = RunLog(Location(str(tmp_path)), Config(), Accelerator(cpu=True), 0, 10), []
    for step, (box, mask) in enumerate(evaluations, 1):
        scores = {"step": step, "split": "val", "bbox": {"ap": box}, "segm": {"ap": mask}}
        best.append(log.is_best(scores))
        log.add_evaluation(scores)
    assert best == expected


@pytest.mark.parametrize(
    ("masks", "count"), [([], 0), ([0.25], 0), ([0.25, 0.25, 0.125], 2), ([0.25, 0.5], 0), ([None, 0.5, None], 1)]
)
def test_evaluations_since_the_best_one(masks: list[float | None], count: int) -> None:
    assert since_best([{"bbox": {"ap": None}, "segm": {"ap": mask}} for mask in masks]) == count


def test_the_summary_of_a_run_names_its_best_evaluation_its_files_and_the_next_commands() -> None:
    steps: list[dict[str, Any]] = [{"seconds": 2.0, "images": 8}, {"seconds": 2.0, "images": 8, "skipped": "loss"}]
    evaluations = [
        {"step": step, "split": "val", "bbox": {"ap": box}, "segm": {"ap": mask}}
        for step, box, mask in ((1, 0.1, None), (2, 0.5, 0.125))
    ]
    data = DataConfig(shards="s3://key:secret@bucket/my shards")
    text = run_summary(Location("runs/my run"), data, steps, evaluations)
    assert text.splitlines() == [
        "finished  2 steps, 16 images in 0:00:04 of training (4.0 images/s)",
        "          1 step skipped, with a loss or gradient that was not finite",
        "best      mask AP 12.5 % and box AP 50.0 % on val, after step 2",
        "weights   'runs/my run/best'",
        "card      'runs/my run/README.md'",
        "curves    'runs/my run/curves.png', 'runs/my run/metrics.csv'",
        "pictures  'runs/my run/batches.jpg', 'runs/my run/pictures'",
        "next      maskstream predict --checkpoint 'runs/my run/best' --out predictions IMAGE ...",
        "          maskstream evaluate --checkpoint 'runs/my run/best' --data.shards 's3://***@bucket/my shards' "
        "--data.split val",
    ]
    assert "best " not in run_summary(Location("runs/one"), data, steps, [])


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_a_run_of_wandb_is_named_after_its_folder_which_keeps_its_id(tmp_path: Path, scheme: str) -> None:
    options = [wandb_options(Location(f"{scheme}{tmp_path}/{name}")) for name in ("first", "first", "other/")]
    assert options[0] == options[1]
    assert [one["name"] for one in options] == ["first", "first", "other"]
    assert options[0]["id"] != options[2]["id"]
    assert options[0]["resume"] == "allow"


def test_pictures_of_an_evaluation_are_in_tensorboard(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config, buffer = Config(), io.BytesIO()
    Image.new("RGB", (1600, 400), "red").save(buffer, "JPEG")
    accelerator = start_accelerator(trackers=config.run.trackers, run=Location(str(tmp_path)))
    log = RunLog(Location(str(tmp_path)), config, accelerator, 0, 10)
    scores = {"step": 7, "split": "val", "bbox": {"ap": 0.5}, "segm": {"ap": 0.25}}
    log.add_evaluation(scores, {"pictures/one": buffer.getvalue()})
    accelerator.end_training()
    events = EventAccumulator(str(tmp_path / "tensorboard/maskstream")).Reload()
    [image] = events.Images("pictures/one")
    assert (image.step, image.width, image.height) == (7, 1000, 250)
    assert np.asarray(Image.open(io.BytesIO(image.encoded_image_string)))[100, 100].tolist() == pytest.approx(
        [255, 0, 0], abs=3
    )


def test_wandb_receives_pictures_and_resumes_its_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.chdir(tmp_path)
    config, run, buffer = Config(), Location(str(tmp_path / "first")), io.BytesIO()
    config.run.trackers = ["wandb"]
    Image.new("RGB", (40, 30), "red").save(buffer, "JPEG")
    for step in (1, 2):
        accelerator = start_accelerator(trackers=config.run.trackers, run=run)
        log = RunLog(run, config, accelerator, step - 1, 10)
        found = accelerator.get_tracker("wandb", unwrap=True)
        assert (found.name, found.id) == ("first", (run / "wandb.txt").read().decode())
        scores = {"step": step, "split": "val", "bbox": {"ap": 0.5}, "segm": {"ap": 0.25}}
        log.add_evaluation(scores, {"pictures/one": buffer.getvalue()})
        accelerator.end_training()
    assert len(list(tmp_path.glob("wandb/offline-run-*"))) == 2  # of one id
    assert len({path.name.rpartition("-")[2] for path in tmp_path.glob("wandb/offline-run-*")}) == 1
    assert list(tmp_path.glob("wandb/offline-run-*/files/media/images/pictures/one_*"))
