import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.requirements import require


@pytest.mark.parametrize(
    ("needs", "message"),
    [
        ({"commands": ["no-such-command"]}, "missing no-such-command: pip install no-such-command"),
        ({"modules": ["json", "no_such_module"]}, "missing no_such_module: pip install no_such_module"),
        ({"files": [Path("/nowhere/x.whl")]}, "/nowhere/x.whl: no such file"),
        ({"modules": ["json"], "python": "/nowhere/python"}, "/nowhere/python cannot be run"),
    ],
)
def test_require_exits_with_one_line(needs: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        require(**needs)
    assert caught.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmark: {message}")


def test_require_accepts_what_is_there() -> None:
    require([Path(sys.executable).name], ["json", "os"], [Path(__file__)], tools=Path(sys.executable).parent)
