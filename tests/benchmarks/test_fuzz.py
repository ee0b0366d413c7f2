"""Changed and hostile inputs: a few of each kind, and that faults are found and reported."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import fuzz
from benchmarks.fuzz_kinds import KINDS, Unnoticed
from shards.common.errors import UserError


@pytest.mark.parametrize(("name", "inputs"), [("checkpoints", 40), ("images", 60), ("samples", 30), ("tables", 40)])
@pytest.mark.filterwarnings("ignore")
def test_a_few_inputs_of_each_kind(tmp_path: Path, name: str, inputs: int) -> None:
    kind = KINDS[name](tmp_path)
    outcomes = [fuzz.outcome_of(kind, name, 1, number) for number in range(inputs)]
    assert [why for outcome, why in outcomes if outcome in fuzz.FAULTS] == []
    assert {outcome for outcome, _ in outcomes} == {"refused", "accepted"}


class Scripted:
    """Inputs that end in every way there is, one after the other."""

    def __init__(self, folder: Path) -> None:
        self.number = 0

    def check(self, rng: np.random.Generator) -> None:
        number = int((folder := Path(os.environ["FUZZ_TEST"])).read_text())
        folder.write_text(str(number + 1))
        endings: list[Any] = [None, UserError("a line"), UserError("two\nlines"), KeyError("x"), Unnoticed("y")]
        if number < len(endings):
            if endings[number] is not None:
                raise endings[number]
        elif number == len(endings):
            os.abort()
        elif number == len(endings) + 1:
            time.sleep(100)


def test_every_fault_costs_one_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "number").write_text("0")
    monkeypatch.setenv("FUZZ_TEST", str(tmp_path / "number"))
    monkeypatch.setattr(fuzz, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(fuzz, "MEMORY", -1)
    found = list(fuzz.try_all(Scripted, "scripted", 0, range(10, 18)))
    outcomes = ["accepted", "refused", "traceback", "traceback", "unnoticed", "crash", "hang", "accepted"]
    assert [(number, outcome) for number, outcome, _ in found] == list(enumerate(outcomes, 10))
    assert found[5][2] == "exit code -6"
    assert "KeyError: 'x'" in found[3][2]
