import math
from typing import Any

import pytest
import torch
from accelerate import Accelerator

from shards.stream.loader import LoaderStatistics
from trainer.run.step_report import PendingStep, StepReport, StepResult, exchange, loading


def report(losses: dict[str, float], **changes: Any) -> StepReport:
    values: dict[str, Any] = {"data_wait_s": 0.5, "read_mb": 2.5, "requests": 3, "retries": 0, "samples": 4}
    return StepReport(losses, **{**values, "cache_hits": 1, "memory_mb": 9.0, "signal": 0, **changes})


def test_exchange_reports_mean_losses_of_a_rank_and_what_its_loader_did() -> None:
    losses = [{"loss_a": torch.tensor(1.0), "loss_b": torch.tensor(2.0)}] * 2 + [
        {"loss_a": torch.tensor(4.0), "loss_b": torch.tensor(-1.0)}
    ]
    loaded = LoaderStatistics(samples=4, cache_hits=1, requests=3, nbytes=2_500_000, seconds=9.0, waited_s=0.5)
    gathered = exchange(Accelerator(cpu=True), losses, loaded, signal=15)
    result = PendingStep(gathered, torch.tensor(2.0), losses, [()] * 3, {}).read(is_scaled=False)
    [own] = result.reports
    assert (result.grad_norm, result.problem, result.signal) == (2.0, "", 15)
    assert own.memory_mb > 10
    assert own == report({"loss_a": 2.0, "loss_b": 1.0}, memory_mb=own.memory_mb, signal=15)


def test_reports_of_all_ranks_become_one_row() -> None:
    reports = [
        report({"loss_a": 1.0, "loss_b": 2.0}),
        report({"loss_a": 3.0, "loss_b": 4.0}, data_wait_s=1.5, read_mb=1.0, requests=5, retries=2, cache_hits=0),
    ]
    assert StepResult(reports, 1.0, "").losses == {"loss_a": 2.0, "loss_b": 3.0}
    assert loading(reports) == {
        "data_wait_s": 1.0,
        "data_wait_longest_s": 1.5,
        "read_mb": 3.5,
        "requests": 8,
        "retries": 2,
        "samples": 8,
        "cache_hits": 1,
        "memory_mb": 9.0,
    }


@pytest.mark.parametrize(
    ("value", "norm", "message"),
    [
        (2.0, 1.0, ""),
        (math.nan, math.nan, "loss_b is nan on rank 0 (samples img3, img4)"),
        (2.0, math.inf, "the gradient is inf, though every loss is finite"),
    ],
)
def test_a_nonfinite_step_is_reported_with_rank_and_samples(value: float, norm: float, message: str) -> None:
    losses = [{"loss_b": torch.tensor(one)} for one in (1.0, value)]
    gathered = exchange(Accelerator(cpu=True), losses, LoaderStatistics(), signal=0)
    pending = PendingStep(gathered, torch.tensor(norm), losses, [("img1", "img2"), ("img3", "img4")], {})
    assert pending.read(is_scaled=False).problem == message
