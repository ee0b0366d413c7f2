import pytest

from shards.common import back_off


def test_delays_double_up_to_a_limit_with_jitter_of_a_half() -> None:
    for failures, mean in ((1, 0.2), (2, 0.4), (4, 1.6), (9, 4.0)):
        delays = {back_off.delay(failures) for _ in range(20)}
        assert len(delays) > 1
        assert all(0.5 * mean <= delay <= 1.5 * mean for delay in delays)


def test_attempts_sleep_before_each_but_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert [(attempt, len(slept)) for attempt in back_off.attempts(3, first_s=1.0)] == [(1, 0), (2, 1), (3, 2)]
    assert 0.5 <= slept[0] <= 1.5
    assert 1.0 <= slept[1] <= 3.0
