from pathlib import Path

from accelerate import Accelerator

from tests.trainer.run.prepared import outcomes_of_prepared_loaders


def test_a_prepared_loader_is_refused_with_the_reason(dataset: Path) -> None:
    """On one rank; `test_two_ranks.py` has the same on two."""
    outcomes = outcomes_of_prepared_loaders(Accelerator(cpu=True), dataset)
    assert len(outcomes) == 16
    for outcome in outcomes.values():
        assert "accelerator.prepare" in outcome
        assert "prepare the model and the optimizer only" in outcome
