"""`fill`: what it changes in a dataset, rounds, resuming, object storage, and inputs that it refuses."""

import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml

from demo.s3server import S3Server
from shards.format import rle
from shards.format.dataset import open_dataset
from shards.format.dataset_writer import DatasetWriter
from shards.format.sample import Instance, Sample
from shards.inspect import cli as inspect_cli
from shards.storage.location import Location
from shards.stream.streams import EvalStream
from tests.support import REPOSITORY, write_dataset
from tests.trainer import tiny
from tests.trainer.tiny import digests, fill_options
from trainer.commands import fill


def samples_of(root: Path | str, split: str = "train") -> list[Sample]:
    return [sample for batch in EvalStream(open_dataset(root), split, batch_size=8) for sample in batch]


def is_inside(instance: Instance) -> bool:
    assert instance.segmentation is not None
    x, y, w, h = rle.bounds(instance.segmentation)
    left, top, width, height = instance.bbox
    return bool(left <= x < x + w <= left + width and top <= y < y + h <= top + height)


@pytest.fixture(scope="module")
def run(dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run that predicts masks. Read only."""
    return tiny.write_checkpoint(tmp_path_factory.mktemp("runs") / "first", dataset, masks=True)


@pytest.fixture(scope="module")
def filled(run: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dataset with masks. Read only."""
    out = tmp_path_factory.mktemp("filled")
    assert fill.main(fill_options(run, dataset, out)) == 0
    return out


def test_fill_adds_masks_of_objects_with_a_box_only_and_nothing_else(
    dataset: Path, filled: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before, after = samples_of(dataset), samples_of(filled)
    assert [sample.without_predictions() for sample in after] == before
    predicted = 0
    for old, new in zip(before, after, strict=True):
        for was, one in zip(old.instances, new.instances, strict=True):
            if was.segmentation is not None or was.is_group_of:
                assert one == was
            elif one.prediction is not None:
                predicted += 1
                assert one.prediction.run == "first, step 1"
                assert 0.5 <= one.prediction.score <= 1
                assert is_inside(one)
    assert predicted >= 4
    assert digests(filled)["val/000000.tar"] == digests(dataset)["val/000000.tar"]
    assert not (filled / ".fill").exists()
    assert inspect_cli.main([str(filled), "--verify"]) == 0
    assert f"{predicted} predicted mask" in capsys.readouterr().out


def test_a_killed_fill_resumes_and_gives_the_same_bytes(run: Path, tmp_path: Path) -> None:
    data = tiny.write_dataset(tmp_path / "data", samples=60)
    options = fill_options(run, data, tmp_path / "killed")
    process = tiny.start(REPOSITORY / "trainer" / "fill.py", options)
    assert process.stdout is not None
    assert "0 of 6 shards done already" in process.stdout.readline()
    assert "train/000000.tar" in process.stdout.readline()
    process.kill()
    process.communicate()
    (tmp_path / "killed/train/000002.tar.77.1.tmp").write_text("a shard that was being written")
    assert fill.main(options) == 0
    assert fill.main(fill_options(run, data, tmp_path / "whole")) == 0
    assert digests(tmp_path / "killed") == digests(tmp_path / "whole")


def test_the_same_command_resumes_and_then_reports_a_complete_dataset(
    run: Path, dataset: Path, filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = fill_options(run, dataset, tmp_path)
    with patch("trainer.prediction.filled_dataset.finish_dataset", side_effect=KeyboardInterrupt):
        assert fill.main(options) == 130
    capsys.readouterr()
    assert fill.main([*options, "--score", "0.6"]) == 2
    assert "score 0.0, not 0.6: give the same options" in capsys.readouterr().err
    assert fill.main(options) == 0
    first, last = capsys.readouterr().out.splitlines()
    assert "3 of 3 shards done already" in first
    assert re.search(r"5 objects of train with a box only, \d masks? predicted \(.*\), mean score 0\.\d\d$", last)
    assert digests(tmp_path) == digests(filled)
    assert fill.main(options) == 0
    assert capsys.readouterr().out == f"{tmp_path}: complete already, with masks by first, step 1\n"
    assert fill.main([*options, "--score", "0.6"]) == 2
    assert "contains the dataset of a fill with score 0.0, not 0.6" in capsys.readouterr().err


def test_files_that_something_damaged_or_deleted_before_a_fill_is_finished(
    run: Path, dataset: Path, filled: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options, record = fill_options(run, dataset, tmp_path), tmp_path / ".fill/shard-00001.json"

    def fill_until(function: str) -> None:
        with patch(f"trainer.prediction.filled_dataset.{function}", side_effect=KeyboardInterrupt):
            assert fill.main(options) == 130
        capsys.readouterr()

    fill_until("finish_dataset")
    record.write_bytes(record.read_bytes()[:-9])
    assert fill.main(options) == 2
    assert re.search(
        r"shard-00001.json: damaged \(.*\): delete it and run the command again\n$", capsys.readouterr().err
    )
    record.unlink()
    (tmp_path / "train/000000.tar").unlink()
    fill_until("delete")  # of the records, after dataset.json is written
    assert fill.main(options) == 0
    assert digests(tmp_path) == digests(filled)


@pytest.mark.parametrize("front", ["tags: [\n", "- a\n", "dataset_info:\n- config_name: one\n", "day: 2026-02-30\n"])
def test_a_card_that_its_owner_wrote_stays_and_gets_the_section(
    front: str, run: Path, dataset: Path, tmp_path: Path
) -> None:
    data = Path(shutil.copytree(dataset, tmp_path / "data"))
    (data / "README.md").write_text(card := f"---\n{front}---\nMine.\n")
    assert fill.main(fill_options(run, data, tmp_path / "filled")) == 0
    text = (tmp_path / "filled/README.md").read_text()
    assert text.startswith(f"{card}\n## Predicted masks\n")


def test_a_second_round_in_a_bucket_predicts_again(
    s3: S3Server, bucket: str, run: Path, dataset: Path, tmp_path: Path
) -> None:
    roots = [f"s3://{bucket}/{name}" for name in ("data", "first", "second")]
    with DatasetWriter(roots[0], tiny.CATEGORIES, samples_per_shard=2) as writer:
        for number in range(5):
            writer.add(tiny.draw_sample(5 * number), "val" if number == 4 else "train")
    readme = Location(roots[0]) / "README.md"
    readme.write(readme.read().replace(b"Complete this section", b"COMPLETED"))
    second = tiny.write_checkpoint(tmp_path / "second", dataset, masks=True, model__mask_head="agnostic")
    for checkpoint, (source, out), splits in ((run, roots[:2], ["train"]), (second, roots[1:], ["val", "train"])):
        words = ["--data.split", *splits, "--data.workers", 1]
        assert fill.main(fill_options(checkpoint, source, out, *words)) == 0
    runs = []
    for root in roots:
        found = [one.prediction for one in samples_of(root)[0].instances if one.prediction is not None]
        runs.append({prediction.run for prediction in found})
        assert inspect_cli.main([root, "--verify"]) == 0
    assert runs == [set(), {"first, step 1"}, {"second, step 1"}]
    assert [sample.without_predictions() for sample in samples_of(roots[2], "val")] == samples_of(roots[0], "val")
    assert (Location(roots[2]) / "accounts.parquet").read() == (Location(roots[0]) / "accounts.parquet").read()
    card = (Location(roots[2]) / "README.md").read().decode()
    assert "mask_run" in str(yaml.safe_load(card.split("---\n")[1])["dataset_info"]["features"])
    assert "COMPLETED" in card
    assert card.count("## Predicted masks") == card.count("with the run `second, step 1`") == 1
    assert open_dataset(roots[2]).info.source["name"] == "DatasetWriter"


def test_what_is_left_with_a_box_only(
    dataset: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Classes that a mask head per class cannot know, boxes from inside of an object, and masks of a low score."""

    def filled_classes(run: Path, *words: object, drawn: Sequence[Sample]) -> set[int]:
        data = tmp_path / f"{run.name}-{len(list(tmp_path.iterdir()))}"
        write_dataset(data, {"train": drawn}, categories=tiny.CATEGORIES)
        assert fill.main(fill_options(run, data, data / "filled", *words)) == 0
        found = [one for sample in samples_of(data / "filled") for one in sample.instances]
        return {one.category_id for one in found if one.prediction is not None}

    def of_all(change: Callable[[Instance], Instance]) -> list[Sample]:
        drawn = map(tiny.draw_sample, range(1, 5))
        return [replace(sample, instances=tuple(map(change, sample.instances))) for sample in drawn]

    discs = of_all(lambda one: replace(one, segmentation=None) if one.category_id == 2 else one)
    inside = of_all(lambda one: replace(one, segmentation=None, is_inside=True))
    no_masks = of_all(lambda one: replace(one, segmentation=None))
    per_class, agnostic = (
        tiny.write_checkpoint(tmp_path / head, dataset, masks=True, model__mask_head=head)
        for head in ("per_class", "agnostic")
    )
    assert filled_classes(agnostic, drawn=discs) == {2}
    assert filled_classes(agnostic, "--score", 1, drawn=discs) == set()
    assert filled_classes(agnostic, drawn=inside) == set()
    assert filled_classes(agnostic, drawn=no_masks) == {1, 2}
    caplog.clear()
    assert filled_classes(per_class, drawn=discs) == set()
    [warning] = caplog.messages
    assert warning.startswith("no mask of Disc in ")
    assert "train with --model.mask_head agnostic or --loss.unmasked masks" in warning
    boxes = tiny.write_checkpoint(tmp_path / "boxes", dataset, masks=True, loss__unmasked="masks")
    assert filled_classes(boxes, drawn=discs) == {2}
    assert filled_classes(boxes, drawn=no_masks) == {1, 2}
    write_dataset(tmp_path / "data", {"train": no_masks}, categories=tiny.CATEGORIES)
    assert fill.main(fill_options(per_class, tmp_path / "data", tmp_path / "filled")) == 2
    assert "no mask of Square, Disc in " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--out", "{data}/../{name}/"], "--out is {data}/../{name}/, which is --data.shards"),
        (["--data.split", "tain"], "there is no split 'tain': it has train, val"),
        (["--data.shards", "{renamed}"], "class 2 is 'Ring' in {renamed}, and 'Disc' in the checkpoint"),
        (["--data.shards", "{filled}", "--out", "{data}"], "{data}: contains another dataset: choose another --out"),
        (["--out", "{parts}"], "{parts}: contains parts of another dataset: choose another --out"),
    ],
)
def test_wrong_inputs_are_one_line(
    words: Sequence[str],
    message: str,
    run: Path,
    dataset: Path,
    renamed: Path,
    filled: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "parts/val").mkdir(parents=True)
    places = {"data": dataset, "name": dataset.name, "renamed": renamed, "filled": filled, "parts": tmp_path / "parts"}
    given = [word.format(**places) for word in words]
    assert fill.main([*fill_options(run, dataset, tmp_path / "out"), *given]) == 2
    error = capsys.readouterr().err
    assert message.format(**places) in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()
