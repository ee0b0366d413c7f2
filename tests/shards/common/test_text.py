import pytest

from shards.common.text import did_you_mean, duration

NAMES = ["Person", "Car", "Land vehicle", "Vehicle registration plate"]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("persn", "did you mean Person?"),
        ("vehicle", "did you mean Land vehicle or Vehicle registration plate?"),
        ("ca", "did you mean Car?"),
        ("zzz", ""),
        ("", ""),
    ],
)
def test_did_you_mean_ignores_case(name: str, hint: str) -> None:
    assert did_you_mean(name, NAMES) == hint
    assert did_you_mean(name, NAMES, "see --help") == (hint or "see --help")
    assert did_you_mean(name, NAMES, limit=1) == hint.split(" or ")[0].rstrip("?") + ("?" if hint else "")


def test_duration() -> None:
    assert [duration(s) for s in (0.4, 48, 425, 12_000)] == ["0 s", "48 s", "7 min 5 s", "3 h 20 min"]
