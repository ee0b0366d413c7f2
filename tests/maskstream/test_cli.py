"""The command `maskstream`, and the names that users import."""

import os
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from unittest.mock import ANY, Mock, call

import pytest

import maskstream
from maskstream import cli
from shards.commands.options import entries
from tests.support import REPOSITORY
from trainer.config.settings import Config


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskstream {maskstream.__version__}\n"
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "[-h | --help] [-V | --version]" in out
    assert all(f"  {name} " in out for name in cli.COMMANDS)
    assert cli.main([]) == 2
    assert capsys.readouterr().err == out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["trian"], "unknown command 'trian': did you mean train?"),
        (["train", "--data.batchsize", "3"], "did you mean --data.batch_size?"),
    ],
)
def test_a_wrong_command_or_option_is_one_line(
    words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(words) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert message in error


SHARDS = ["--data.shards", "s3://bucket/prefix"]
TWO_GPUS = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1"]
TWO_GPUS += ["--mixed_precision", "no", "--dynamo_backend", "no"]
PREDICT = ["predict", "--checkpoint", "run", "--out", "out"]


@pytest.mark.parametrize(
    ("words", "gpus", "configured", "options"),
    [
        (["train", *SHARDS], 1, False, None),
        (["train", *SHARDS], 2, False, TWO_GPUS),
        (["train", *SHARDS], 2, True, []),
        (["train", *SHARDS], 0, True, []),
        ([*PREDICT, *SHARDS], 2, False, TWO_GPUS),
        (["fill", "--checkpoint", "run", "--out", "out", *SHARDS], 2, False, TWO_GPUS),
        ([*PREDICT, "street.jpg"], 2, False, None),  # images need a single process
        ([*PREDICT, "street.jpg"], 2, True, None),
    ],
)
def test_a_command_is_launched_on_several_gpus_or_as_accelerate_is_configured(
    words: list[str],
    gpus: int,
    configured: bool,
    options: list[str] | None,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = tmp_path / "default_config.yaml"
    if configured:
        config.touch()
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", str(config))
    launch, here = Mock(return_value=7), Mock(return_value=0)
    name, *arguments = words
    monkeypatch.setattr("trainer.commands.launcher.launch", launch)
    monkeypatch.setattr(f"trainer.commands.{name}.main", here)
    assert cli.main(words) == (0 if options is None else 7)
    script = REPOSITORY / "trainer" / f"{name}.py"
    assert launch.mock_calls == ([] if options is None else [call(script, arguments, options, ANY)])
    assert here.mock_calls == ([call(arguments, f"maskstream {name}")] if options is None else [])


@pytest.mark.slow
def test_a_launched_command_has_the_exit_status_and_the_message_of_its_ranks(tmp_path: Path) -> None:
    (tmp_path / "accelerate").mkdir()
    config = "{compute_environment: LOCAL_MACHINE, distributed_type: 'NO', num_processes: 1, num_machines: 1, "
    config += "mixed_precision: 'no', machine_rank: 0, use_cpu: true}"
    (tmp_path / "accelerate" / "default_config.yaml").write_text(config)
    command = [sys.executable, "-m", "maskstream", "train", "--data.shards", "/nowhere", "--run.dir", str(tmp_path)]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("train: error: /nowhere")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_the_help_of_a_command_names_it_as_it_was_started(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    own = {"build": "build-shards", "classes": "build-shards", "inspect": "inspect-shards"}
    own |= {"train": "usage: maskstream train --config RECIPE"}
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert own.get(name, f"usage: maskstream {name} [options]") in capsys.readouterr().out
    if name not in own and name not in ("export", "recipes"):  # which are no scripts
        with pytest.raises(SystemExit):
            import_module(f"trainer.commands.{name}").main(["--help"])
        assert capsys.readouterr().out.startswith(f"usage: {name}.py [options]")


def test_a_public_name_is_the_object_of_its_module() -> None:
    for name, module in maskstream._MODULES.items():
        assert getattr(maskstream, name) is getattr(import_module(module), name)
    assert set(maskstream.__all__) <= set(dir(maskstream))
    with pytest.raises(AttributeError, match="no attribute 'ShardStreem'"):
        maskstream.ShardStreem  # noqa: B018


def test_recipes_are_listed_and_printed(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["recipes"]) == 0
    listed = capsys.readouterr().out
    for name in [path.stem for path in (REPOSITORY / "configs").glob("*.yaml")]:
        assert f"  {name} " in listed
        assert cli.main(["recipes", name]) == 0
        assert capsys.readouterr().out == (REPOSITORY / "configs" / f"{name}.yaml").read_text()
    assert max(map(len, listed.splitlines())) <= 120
    assert cli.main(["recipes", "trafic"]) == 2
    assert "there is no recipe 'trafic': did you mean traffic" in capsys.readouterr().err


def test_the_short_help_of_training_has_the_recipes_and_the_long_one_every_option(
    capsys: pytest.CaptureFixture[str],
) -> None:
    texts = []
    for option in ("--help", "--help-all"):
        with pytest.raises(SystemExit) as ended:
            cli.main(["train", option])
        assert ended.value.code == 0
        texts.append(capsys.readouterr().out)
    assert len(texts[0].splitlines()) < 70
    assert "  traffic-heads-first  The traffic classes from COCO's weights" in texts[0]
    assert [f"--{name} " in texts[1] for name in entries(Config)] == [True] * len(entries(Config))
