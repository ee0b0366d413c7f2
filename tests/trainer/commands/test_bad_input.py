"""Help and wrong arguments of the trainer's commands."""

import shlex
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

from tests.support import REPOSITORY
from tests.trainer import tiny


def test_help_and_a_wrong_argument_import_only_light_modules() -> None:
    code = """if True:
        import sys
        from contextlib import suppress
        import maskstream
        from trainer.commands import compare, evaluate, predict, train
        for command in (compare, evaluate, predict, train):
            assert command.main(["--data.shard=3"]) == 2
            with suppress(SystemExit):
                command.main(["--help"])
        print(sorted({"torch", "pandas", "pyarrow", "numpy", "webdataset"} & sys.modules.keys()), file=sys.stderr)
        """
    done = subprocess.run([sys.executable, "-c", code], env=tiny.environment(), capture_output=True, text=True)
    *errors, modules = done.stderr.splitlines()
    message = "error: unknown argument --data.shard: did you mean --data.shards? (see --help)"
    assert errors == [f"{name}: {message}" for name in ("compare", "evaluate", "predict", "train")]
    assert modules == "[]"
    assert done.stdout.count("usage: ") == 4


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("train --data.shards ''", "data.shards is empty: give --data.shards"),
        ("train --data.shards /nowhere/at/all", "/nowhere/at/all: there is no dataset.json"),
        ("train --data.batch_size 25", "24 samples, fewer than one batch of 25"),
        ("train --data.split test", "there is no split 'test'"),
        ("train --data.val_split test", "data.val_split is 'test': the dataset has train, val"),
        ("train --data.classes [Sqare]", "there is no class 'Sqare': did you mean Square?"),
        ("train --data.fraction 0", "fraction is 0.0: it must be above 0"),
        ("train --data.fraction 1e-6", "no sample is selected"),
        ("train --model.weights /nowhere.safetensors", "/nowhere.safetensors: there is no such object"),
        ("train --train.layers 3+", "layers would stay random"),
        ("train --train.precision fp16", "is fp16, which needs a GPU, and this process has none: use fp32 or bf16"),
        ("train --run.trackers [tensorbord]", "run.trackers: accelerate does not know 'tensorbord': it knows aim, "),
        ("train --run.trackers [wandb]", "run.trackers: wandb is not installed: pip install wandb, or leave it out"),
        ("evaluate --checkpoint /proc/nowhere", "/proc/nowhere: there is no checkpoint"),
        ("evaluate --data.split test", "there is no split 'test'"),
        ("evaluate --score-threshold 1.5", "--score-threshold is 1.5: it must be between 0 and 1"),
        ("evaluate --score-threshold nan", "--score-threshold is nan: give a finite number"),
        ("evaluate --detections 0", "--detections is 0: it must be at least 1"),
        ("evaluate --data.workers -1", "--data.workers is -1: it must be at least 0"),
        ("evaluate --hierarchy nowhere.json", "nowhere.json"),
        ("predict", "give either images or --data.shards"),
        ("predict x.jpg --data.shards d", "give either images or --data.shards"),
        ("predict x.jpg --part-images 2", "--part-images needs --data.shards"),
        ("predict --data.shards d --part-images 0", "--part-images is 0: it must be at least 1"),
        ("predict --data.shards d --device cpu", "--device is for images"),
        ("predict --data.shards DATASET --data.split test", "there is no split 'test'"),
        ("predict --data.shards RENAMED", "class 2 is 'Ring' in RENAMED, and 'Disc' in the checkpoint CHECKPOINT"),
        ("evaluate --data.shards RENAMED", "class 2 is 'Ring' in RENAMED, and 'Disc' in the checkpoint CHECKPOINT"),
        ("predict x.jpg --hierarchy tree.json", "--hierarchy needs --submission"),
        ("predict nowhere/*.jpg", "nowhere/*.jpg: nothing matches"),
        ("predict tests/trainer", "the folder has no image directly in it"),
        ("predict --score 2 x.jpg", "--score is 2.0: it must be between 0 and 1"),
        ("predict --device nonsense x.jpg", "--device nonsense: it cannot be used"),
        *(
            (f"compare compare-layers --data.shards d {resume}", "a comparison does not take run.resume (--resume): ")
            for resume in ("--resume", "--run.resume last", "--resume /runs/a")
        ),
    ],
)
@pytest.mark.usefixtures("fresh_accelerator")
def test_bad_input_is_one_line(
    words: str,
    message: str,
    dataset: Path,
    renamed: Path,
    checkpoint: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", lambda: ["tensorboard"])
    monkeypatch.chdir(REPOSITORY)
    out = tmp_path / "out"
    for word, path in (("DATASET", dataset), ("RENAMED", renamed), ("CHECKPOINT", checkpoint)):
        words, message = words.replace(word, str(path)), message.replace(word, str(path))
    name, *more = shlex.split(words)
    required = {
        "train": tiny.arguments(dataset, out),
        "compare": ["--run.dir", str(out)],
    }.get(name, ["--checkpoint", str(checkpoint), "--out", str(out)])
    assert import_module(f"trainer.commands.{name}").main([*required, *more]) == 2
    *logged, error = capsys.readouterr().err.splitlines()
    assert error.startswith(f"{name}: error: ")
    assert message in error
    assert name == "train" or not logged
    assert not out.exists()


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("evaluate", "--checkpoint /nowhere --out"),
        ("predict", "a.jpg --checkpoint /nowhere --out"),
        ("predict", "--data.shards DATASET --checkpoint /nowhere --out"),
        ("compare", "compare-layers --data.shards /nowhere --run.dir"),
        ("train", "--data.shards DATASET --data.val_split= --model.weights /nowhere --run.dir"),
    ],
)
def test_a_folder_that_cannot_be_written_is_reported_before_anything_is_loaded(
    name: str, words: str, dataset: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [*words.replace("DATASET", str(dataset)).split(), "/proc/nowhere"]
    assert import_module(f"trainer.commands.{name}").main(arguments) == 2
    message = f"/proc/nowhere: cannot be written (/proc is not a writable folder): choose another {arguments[-2]}"
    assert capsys.readouterr().err == f"{name}: error: {message}\n"
