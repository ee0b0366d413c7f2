"""Progress: lines of text without a terminal, a bar that vanishes on one."""

import io
import itertools
import logging
import sys
from collections.abc import Iterator

import pytest

from builder.commands.progress import PackingProgress
from shards.commands import progress
from shards.commands.command_line import run, say
from shards.commands.progress import LogHandler, Progress
from shards.common.errors import UserError


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_without_a_terminal_lines_are_reported_every_few_seconds(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("shards.commands.progress.time.monotonic", itertools.count(0.0, 10.0).__next__)
    lines: list[str] = []
    with Progress("evaluating val", 100, "images", lines.append) as shown:
        for _ in range(4):
            shown.advance(20)
    assert lines == [
        "evaluating val: 40 of 100 images, 2.0 images/s, 30 s left",
        "evaluating val: 80 of 100 images, 2.0 images/s, 10 s left",
    ]
    with Progress("evaluating val", 100, "images", lines.append, is_shown=False) as hidden:
        for _ in range(4):
            hidden.advance(20)
    assert len(lines) == 2
    assert capsys.readouterr() == ("", "")


def test_packing_reports_bytes_and_failures(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_S", 0.0)
    with caplog.at_level("INFO", "builder.commands.progress"), PackingProgress() as packing:
        packing.expect(10)
        packing.add(4, 2_000_000, 1)
    [line] = caplog.messages
    assert line.startswith("packing: 4 of 10 images, ")
    assert " MB/s, 1 failed, " in line


@pytest.mark.parametrize("after", [0.0, 3600.0])
def test_on_a_terminal_text_and_log_are_above_a_bar_which_vanishes(
    after: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BAR_AFTER_S", after)
    terminal, lines = Terminal(), list[str]()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setattr(sys, "stdout", terminal)
    log = logging.Logger("test", logging.INFO)
    log.addHandler(LogHandler(terminal))
    with Progress("exporting", 3, "images", lines.append) as shown:
        for number in range(3):
            shown.advance(1, "note")
            say(f"said {number}")
            log.info("logged %d", number)
    written = terminal.getvalue()
    assert not lines
    if after:  # no work of less than a second has a bar
        assert written == "".join(f"said {number}\nlogged {number}\n" for number in range(3))
        return
    assert "exporting: 1/3 images |" in written
    for number in range(3):  # each at the start of a line that was cleared
        assert f"\rsaid {number}\n" in written
        assert f"\rlogged {number}\n" in written
    assert written.endswith("\r")
    assert written.split("\r")[-2].strip() == ""


@pytest.mark.parametrize("error", [UserError, KeyboardInterrupt])
def test_on_a_terminal_an_error_has_a_line_of_its_own_although_a_bar_is_drawn(
    error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "BAR_AFTER_S", 0.0)
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)

    def samples() -> Iterator[int]:  # its bar is drawn until it is closed
        with Progress("exporting", 3, "images", list[str]().append) as shown:
            shown.advance(1)
            yield 1

    def action() -> int:
        for _ in (kept := samples()):
            raise error("the disk is full")
        return len([*kept])

    assert run("export", action) in (2, 130)
    [line] = [line for line in terminal.getvalue().split("\r") if "export: " in line]
    assert line in ("export: error: the disk is full\n", "export: interrupted\n")
