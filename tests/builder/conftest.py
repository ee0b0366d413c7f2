"""Settings of all tests of the builder."""

import pytest
from hypothesis import settings

from builder.fetching import log_once

# Examples have no deadline, because the machine may be busy, and are the same in every run.
settings.register_profile("maskstream", deadline=None, derandomize=True)
settings.load_profile("maskstream")


@pytest.fixture(autouse=True)
def _no_warning_logged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Warnings that are logged once per process are logged once per test."""
    monkeypatch.setattr(log_once, "_logged", set())
