"""Exit statuses and one-line errors of the trainer's commands."""

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch.distributed import DistBackendError, DistNetworkError

from shards.common.errors import UserError
from trainer.commands import command_line as command
from trainer.commands.launcher import RANKS

GLOO = "[../third_party/gloo/gloo/transport/tcp/pair.cc:547] "


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(GLOO + "Connection closed by peer [127.0.0.1]:31415"),
        RuntimeError(GLOO + "Read error [127.0.0.1]:31415: Connection reset by peer"),
        RuntimeError(GLOO + "writev [127.0.0.1]:31415: Broken pipe"),
        DistBackendError(
            "NCCL error ... ncclRemoteError: A call failed possibly due to a network error or a remote process exiting "
            "prematurely."
        ),
        DistNetworkError("Failed to recv, got 0 bytes. Connection was likely closed. Did the remote server shutdown?"),
    ],
)
def test_a_lost_rank_is_one_line(
    error: Exception, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command, "MAIN_RANK_TIMEOUT_S", 0)
    monkeypatch.setenv("RANK", "3")
    assert command.run("train", Mock(side_effect=error)) == 1
    assert capsys.readouterr().err == (
        "train: rank 3 ends: it lost the connection to another rank, whose own message says why\n"
    )


@pytest.mark.parametrize(
    ("name", "remedy"), [("train", "lower --data.batch_size and"), ("evaluate", "lower --batch-size")]
)
def test_a_full_gpu_is_one_line_with_what_helps(name: str, remedy: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 14.56 GiB of which 1.2 GiB is"
    assert command.run(name, Mock(side_effect=torch.OutOfMemoryError(text))) == 2
    start = f"{name}: error: out of memory: GPU 0 has a total capacity of 14.56 GiB: {remedy}"
    assert capsys.readouterr().err.startswith(start)


@pytest.mark.parametrize("error", [RuntimeError("shape mismatch"), DistBackendError("NCCL error: invalid usage")])
def test_other_errors_of_torch_are_raised(error: Exception) -> None:
    with pytest.raises(type(error)):
        command.run("train", Mock(side_effect=error))


@pytest.mark.parametrize(("rank", "line"), [("0", "train: error: a b\n"), ("1", "train: error on rank 1: a b\n")])
def test_an_error_names_its_rank_after_the_main_rank_had_time_to_report_it(
    rank: str, line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[tuple[float, str]] = []
    monkeypatch.setattr("time.sleep", lambda seconds: waits.append((seconds, capsys.readouterr().err)))
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error"))
    monkeypatch.setenv(RANKS, str(tmp_path / "removed"))  # a launcher that ended
    assert command.run("train", Mock(side_effect=UserError("a\nb"))) == 2
    assert capsys.readouterr().err == line
    assert waits == ([(command.MAIN_RANK_TIMEOUT_S, "")] if rank == "1" else [])
    assert json.loads((tmp_path / "error").read_text())["message"] == line.strip()
