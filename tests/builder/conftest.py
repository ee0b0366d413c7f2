import pytest

from builder.fetching import log_once


@pytest.fixture(autouse=True)
def _no_warning_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that are logged once per process are logged once per test."""
    monkeypatch.setattr(log_once, "_logged", set())
