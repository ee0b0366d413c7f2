"""The command `maskstream`."""

from pathlib import Path
from unittest.mock import ANY, Mock, call

import pytest

import maskstream
from maskstream import cli
from tests.support import REPOSITORY


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskstream {maskstream.__version__}\n"
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
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


@pytest.mark.parametrize("command", ["build", "inspect"])
def test_build_and_inspect_are_the_other_two_commands(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    assert f"{command}-shards" in capsys.readouterr().out


@pytest.mark.parametrize("gpus", [0, 1, 2])
def test_train_starts_the_launcher_where_there_are_several_gpus(
    gpus: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = str(tmp_path / "default_config.yaml")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", config)
    launch, here = Mock(return_value=7), Mock(return_value=0)
    monkeypatch.setattr("trainer.commands.launcher.launch", launch)
    monkeypatch.setattr("trainer.commands.train.main", here)
    arguments = ["--data.shards", "s3://bucket/prefix", "--run.dir", "runs/one"]
    assert cli.main(["train", *arguments]) == (7 if gpus > 1 else 0)
    assert launch.mock_calls == ([call(REPOSITORY / "trainer/train.py", arguments, [], ANY)] if gpus > 1 else [])
    assert here.mock_calls == ([] if gpus > 1 else [call(arguments)])
