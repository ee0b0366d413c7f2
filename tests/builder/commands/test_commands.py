"""The command as scripts use it: dry runs, JSON, exit codes, locks, interrupts, and what it never says."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from builder.commands.build import Summary
from builder.commands.cli import SHORTFALL, _RedactingFormatter, main
from builder.commands.dry_run import SAMPLED
from builder.commands.summary import render_estimate, render_summary
from builder.sources.openimages.layout import source_location
from builder.sources.openimages.source import OpenImages
from builder.target.build_lock import LOCK_FILE
from demo.s3proxy import S3Proxy
from demo.s3server import S3Server
from demo.scenes import SceneTruth
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import build, estimate, quotas
from tests.support import REPOSITORY

CHOICE = quotas(("Person", "Car"), 8, 3, images_per_shard=4)
WORDS = ["--classes", "Person", "Car", "--per-class", "8", "--eval-per-class", "3", "--images-per-shard", "4"]


def mirror(scenes: SceneTruth) -> OpenImages:
    return OpenImages(source_location(str(scenes.images)), source_location(str(scenes.annotations)))


def words(scenes: SceneTruth, out: Path | str, *more: str) -> list[str]:
    places = ["--images", str(scenes.images), "--annotations", str(scenes.annotations), "--out", str(out)]
    return [*WORDS, *places, "--workers", "1", *more]


def test_a_dry_run_foretells_the_build_and_writes_nothing(
    s3: S3Server, s3_scenes: SceneTruth, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = OpenImages(source_location("s3://open-images-dataset"), source_location("s3://openimages"))
    root = Location(f"s3://{bucket}/out")
    with S3Proxy(s3.endpoint_url) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
        monkeypatch.setattr("shards.storage.location._instances", {})
        found = estimate(source, CHOICE, root)
        assert not proxy.counters.requests["PUT"]
        before = len(proxy.requests)
        summary = build(source, CHOICE, root)
        packing = [seen for seen in proxy.requests[before:] if seen.method == "GET"]
    assert found.images == summary.handled == summary.samples <= SAMPLED
    assert found.shards == summary.shards
    assert list(found.counts) == list(summary.counts)
    assert found.jpegs == summary.images  # every length was in the sample
    assert found.masks == summary.masks
    assert found.output == pytest.approx(summary.nbytes, rel=0.25)
    assert found.masks_wanted <= found.masks.nbytes < found.whole_zips
    assert sum(seen.key.endswith(".jpg") for seen in packing) == summary.images.requests + 1  # and one to see if it can
    assert found.whole_images is None
    assert found.whole_tables is not None
    for text in (render_estimate(found, "x"), render_summary(summary, "x")):
        assert f"{found.images} images in {found.shards} shards" in text
        assert "train  Person" in text
    told = render_summary(Summary(already_built=False, recovered=1, shards=1, samples=1, handled=1), "x")
    assert "1 image in 1 shard, " in told
    assert "recovered: 1 image or mask\n" in told
    assert "1 image in 0 s" in told


def test_what_is_said_of_lengths_is_marked_as_an_estimate(scenes: SceneTruth, tmp_path: Path) -> None:
    shutil.copytree(scenes.images, tmp_path / "images")
    for picture in sorted((tmp_path / "images" / "train").iterdir())[::4]:
        picture.unlink()
    source = OpenImages(source_location(str(tmp_path / "images")), source_location(str(scenes.annotations)))
    found = estimate(source, quotas(("Person",), 1000, 0), Location(str(tmp_path / "out")))
    assert 0 < found.unavailable < found.sampled
    text = render_estimate(found, "out")
    assert f"from the lengths of {found.sampled}, {found.unavailable} of which cannot be had" in text
    assert not (tmp_path / "out").exists()


def test_json_is_all_that_stdout_gets(scenes: SceneTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    for extra, key in (
        (["--dry-run"], "jpegs_error"),
        ([], "samples"),
        ([], "already_built"),
        (["--retry-failed"], "recovered"),
    ):
        assert main(words(scenes, out, "--json", *extra)) == 0
        value = json.loads(capsys.readouterr().out)
        assert key in value
        assert value["dry_run"] == (extra == ["--dry-run"])
        assert out.exists() == (extra != ["--dry-run"])


def test_exit_codes_tell_whether_something_is_short(
    scenes: SceneTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(scenes.images, images)
    command = words(scenes, out, "--per-class", "1000", "--eval-per-class", "0", "--images", str(images))
    assert main([*command[:-2], "--images", str(images), "--out", str(tmp_path / "whole")]) == 0
    assert "only " in capsys.readouterr().out  # less than 1000 at the source: told, and no failure
    victim = images / "train" / f"{open_dataset(str(tmp_path / 'whole')).index('train').image_id(0)}.jpg"
    hidden = victim.rename(tmp_path / victim.name)
    assert main(command) == SHORTFALL == 3
    assert "(try --retry-failed)" in capsys.readouterr().out
    assert main(command) == SHORTFALL  # already built, and short as before
    assert main([*command, "--retry-failed"]) == SHORTFALL
    assert "recovered: nothing" in capsys.readouterr().out
    hidden.rename(victim)
    assert main([*command, "--retry-failed"]) == 0
    assert "recovered: " in capsys.readouterr().out
    assert main(command) == 0


def start(arguments: list[str], **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "builder.commands.cli", *arguments],
        cwd=REPOSITORY,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(path: Path, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 60
    while not path.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    assert path.exists()


def test_a_second_build_is_refused_while_the_first_works_and_a_killed_one_is_no_obstacle(
    scenes: SceneTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    out = tmp_path / "out"
    first = start(words(scenes, out, "--images-per-shard", "1"))
    wait_for(out / ".build" / "plan.json", first)
    first.send_signal(signal.SIGSTOP)
    assert (out / LOCK_FILE).exists()
    for extra in ([], ["--overwrite"], ["--retry-failed"], ["--dry-run"]):
        assert main(words(scenes, out, "--images-per-shard", "1", *extra)) == 2
        last = capsys.readouterr().err.splitlines()[-1]
        assert f"another build is at work there: process {first.pid} on " in last
    first.kill()
    first.communicate()
    assert main(words(scenes, out, "--images-per-shard", "1")) == 0
    assert "taking over the lock" in caplog.text
    assert not (out / LOCK_FILE).exists()


class Files(BaseHTTPRequestHandler):
    """A web server for a folder that knows ranges; it does not care who asks."""

    folder = Path()
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path = self.folder / self.path.lstrip("/")
        if not path.is_file():
            return self.send_error(404)
        data = path.read_bytes()
        start, _, end = self.headers.get("Range", "").removeprefix("bytes=").partition("-")
        part = data[int(start or 0) : int(end) + 1 if end else None]
        self.send_response(206 if "Range" in self.headers else 200)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Content-Range", f"bytes {start or 0}-{int(start or 0) + len(part) - 1}/{len(data)}")
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(part)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_no_credential_is_printed_or_stored(
    scenes: SceneTruth, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Web roots with a user and a password, good and bad ones; the log as the command's own formatter has it."""
    handler = type("Handler", (Files,), {"folder": scenes.images.parent})
    out = tmp_path / "out"
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        root = f"http://somebody:hunter2@127.0.0.1:{server.server_port}"
        tables = ["--annotations", f"{root}/{scenes.annotations.name}", "--out", str(out), "--workers", "1"]
        good, bad = f"{root}/{scenes.images.name}", f"{root}/nowhere"
        assert main([*WORDS, "--images", good, *tables]) == 0
        assert main([*WORDS, "--images", good, *tables, "--json", "--dry-run"]) == 0
        assert main([*WORDS, "--images", bad, *tables, "--overwrite"]) == 2
        assert main([*WORDS, "--images", good, "--annotations", bad, "--out", str(out)]) == 2
        server.shutdown()
    said = capsys.readouterr()
    log = "\n".join(map(_RedactingFormatter("%(message)s").format, caplog.records))
    stored = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for text in (said.out, said.err, log, stored.decode("latin-1")):
        assert "hunter2" not in text
    assert "***@" in said.err
    assert "***@" in log


def test_a_config_file_builds_what_flags_build(scenes: SceneTruth, tmp_path: Path) -> None:
    file = tmp_path / "pets.yaml"
    file.write_text(
        f"classes: [Person, Car]\nper_class: 99\nimages: {scenes.images}\nannotations: {scenes.annotations}"
    )
    more = ["--per-class", "8", "--eval-per-class", "3", "--images-per-shard", "4", "--workers", "1"]
    assert main(["--config", str(file), *more, "--out", str(tmp_path / "a")]) == 0
    assert main(words(scenes, tmp_path / "b")) == 0
    assert open_dataset(str(tmp_path / "a")).info.shards == open_dataset(str(tmp_path / "b")).info.shards


def test_what_was_done_is_measured(scenes: SceneTruth, tmp_path: Path) -> None:
    summary = build(mirror(scenes), CHOICE, Location(str(tmp_path / "out")))
    table = open_dataset(str(tmp_path / "out")).table
    ids = table["image_id"].to_pylist()
    files = {path.stem: path.stat().st_size for path in scenes.images.rglob("*.jpg")}
    assert summary.images.nbytes == sum(files[image_id] for image_id in ids)
    assert summary.images.requests == len(ids)
    assert 0 < summary.packing <= summary.seconds
    assert summary.tables.requests > 0
    assert isinstance(summary, Summary)


def test_progress_is_quiet_off_a_terminal_and_tells_all_it_knows(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from builder.commands.progress import Progress, duration

    monkeypatch.setattr("builder.commands.progress.LINE_EVERY_S", 0.0)
    with caplog.at_level("INFO", "builder.commands.progress"), Progress() as progress:
        progress.expect(10)
        time.sleep(0.01)
        progress.advance(4, 2_000_000, 1)
        progress.expect(1)
        progress.advance(7, 1, 0)
    first, last = (record.getMessage() for record in caplog.records)
    for told in ("4 of 10 images", "images/s", "MB/s", "1 failed", "left"):
        assert told in first
    assert last.startswith("packed 11 of 11")
    assert last.endswith("0 s left")
    assert [duration(s) for s in (0.4, 48, 425, 12_000)] == ["0 s", "48 s", "7 min 5 s", "3 h 20 min"]
