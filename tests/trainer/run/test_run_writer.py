"""`RunWriter`: one training writes into a run's folder."""

from pathlib import Path

import pytest

from shards.common.errors import UserError
from shards.storage.location import Location
from trainer.run.run_writer import WRITER_FILE, RunWriter


def test_on_a_disk_a_second_writer_waits_and_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Location(str(tmp_path / "runs" / "one"))
    monkeypatch.setattr(RunWriter, "timeout_s", 0.0)
    with RunWriter(run) as first, RunWriter(run) as second:
        first.claim()
        with pytest.raises(UserError, match=rf"^{run}: another training is writing there: wait .*--run.dir"):
            second.claim()
        first.check()
    with RunWriter(run) as third:  # the first has ended
        third.claim()
        (tmp_path / "runs" / "one" / "file").touch()
    assert [path.name for path in (tmp_path / "runs" / "one").iterdir()] == ["file"]


def test_a_folder_that_stays_empty_is_removed(tmp_path: Path) -> None:
    for folder, is_kept in ((tmp_path / "new", False), (tmp_path / "old", True)):
        (tmp_path / "old").mkdir(exist_ok=True)
        with RunWriter(Location(str(folder))) as writer:
            writer.claim()
        assert folder.exists() == is_kept


def test_a_writer_waits_for_one_that_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Location(str(tmp_path))
    with RunWriter(run) as first, RunWriter(run) as second:
        first.claim()
        monkeypatch.setattr("time.sleep", lambda seconds: first.__exit__())
        second.claim()


def test_on_a_store_the_newest_writer_takes_over(tmp_path: Path) -> None:
    run = Location(f"memory://{tmp_path.name}/run")
    with RunWriter(run) as first, RunWriter(run) as second:
        first.claim()
        first.check()
        second.claim()
        second.check()
        (run / WRITER_FILE).write(b"{")
        second.check()
        (run / WRITER_FILE).delete()  # by somebody who tidies up
        second.check()
        second.claim()
        with pytest.raises(UserError, match=r"another training \(process \d+ on .*\) has taken this run over"):
            first.check()
