"""The command `maskstream`."""

from pathlib import Path

import pytest

import maskstream
from maskstream import cli


def test_version_and_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"maskstream {maskstream.__version__}\n"
    assert cli.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert all(f"  {name} " in out for name in cli.COMMANDS)


def test_no_command_shows_the_help_and_ends_with_2(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([]) == 2
    assert "commands:" in capsys.readouterr().err


def test_an_unknown_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["trian"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "unknown command 'trian'" in error
    assert "train" in error


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
    launched, here = [], []
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    config = str(tmp_path / "default_config.yaml")
    monkeypatch.setattr("accelerate.commands.config.config_args.default_config_file", config)
    monkeypatch.setattr("trainer.commands.launcher.launch", lambda *given: launched.append(given) or 7)
    monkeypatch.setattr("trainer.commands.train.main", lambda given: here.append(given) or 0)
    arguments = ["--data.shards", "s3://bucket/prefix", "--run.dir", "runs/one"]

    assert cli.main(["train", *arguments]) == (7 if gpus > 1 else 0)

    if gpus > 1:
        [(script, given, options, _)] = launched
        assert (script.name, given, options, here) == ("train.py", arguments, [], [])
    else:
        assert (here, launched) == ([arguments], [])


def test_a_wrong_option_of_train_is_one_line_before_anything_starts(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "--data.batchsize", "3"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "--data.batch_size" in error
