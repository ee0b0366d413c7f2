import json
import re
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from builder.commands.cli import SHORTFALL, main
from builder.sources.openimages.layout import source_location
from builder.target.build_lock import BuildLock
from demo.s3server import S3Server
from demo.scenes import SceneTruth
from shards.common.redact import RedactingFormatter
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import ANNOTATIONS, IMAGES
from tests.support import forget_connections

Capture = pytest.CaptureFixture[str]
WORDS = ["--classes", "Person", "Car", "--per-class", "8", "--eval-per-class", "3", "--images-per-shard", "4"]


def words(scenes: SceneTruth, out: Path | str, *more: str) -> list[str]:
    places = ["--images", str(scenes.images), "--annotations", str(scenes.annotations), "--out", str(out)]
    return [*WORDS, *places, "--workers", "1", *more]


def one_line(capsys: Capture, *arguments: str) -> str:
    assert main(arguments) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("build-shards: error: ")
    return line


def without_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    forget_connections(monkeypatch)
    monkeypatch.setattr("shards.storage.location.S3_ATTEMPTS", 1)
    monkeypatch.setattr("shards.common.back_off.SCALE", 0.0)


def test_only_the_public_bucket_is_read_unsigned(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    urls = ("s3://open-images-dataset", "s3://open-images-dataset-mine", "s3://bucket/prefix")
    assert [source_location(url).anonymous for url in urls] == [True, False, False]
    assert source_location("s3://bucket/prefix", anonymous=True).anonymous
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:8333")
    assert not source_location("s3://open-images-dataset").anonymous


def test_bad_classes_and_places_are_one_line_each(
    s3_scenes: SceneTruth, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_retries(monkeypatch)
    out, missing = str(tmp_path / "out"), "s3://no-such-bucket"
    for images, annotations, root, message in (
        (missing, ANNOTATIONS, out, "no-such-bucket"),
        (IMAGES, missing, out, "no-such-bucket"),
        (IMAGES, ANNOTATIONS, f"{missing}/x", "no-such-bucket"),
        (IMAGES, ANNOTATIONS, "/proc/nowhere", "/proc/nowhere: cannot be written (/proc is not a writable folder)"),
        (str(tmp_path / "gone"), ANNOTATIONS, out, "no such folder"),
        (IMAGES, str(tmp_path / "gone"), out, "no such object"),
        (IMAGES, "http://127.0.0.1:9/x", out, "cannot be reached"),
    ):
        places = ["--images", images, "--annotations", annotations, "--out", root]
        assert message in one_line(capsys, "--per-class", "5", *places)
    assert "'Persn': did you mean Person" in one_line(capsys, "--classes", "Persn", *words(s3_scenes, out)[3:])
    assert not Path(out).exists()


def test_missing_credentials_and_an_unreachable_endpoint_are_one_line(
    s3: S3Server, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ("--per-class", "5", "--images", "s3://images", "--out", str(tmp_path / "out"))
    with monkeypatch.context() as patch:
        without_retries(patch)
        patch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
        assert "cannot be reached" in one_line(capsys, *command)
    without_retries(monkeypatch)
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    assert "credentials" in one_line(capsys, *command)


def test_a_build_from_s3_to_s3(s3: S3Server, s3_scenes: SceneTruth, bucket: str, capsys: Capture) -> None:
    root = f"s3://{bucket}/some/prefix"
    command = [*WORDS, "--workers", "1", "--images", IMAGES, "--annotations", ANNOTATIONS, "--out", root]
    assert main(command) == 0
    printed = capsys.readouterr().out
    assert f"next: inspect-shards {root}" in printed
    assert "not packed: nothing" in printed
    names = {path.removeprefix(f"{bucket}/some/prefix/") for path in s3.filesystem().find(bucket)}
    assert {"dataset.json", "index.parquet", "accounts.parquet", "README.md", "README.jpg", "train/000000.tar"} <= names
    assert not any(name.startswith(".build") for name in names)
    assert main(command) == 0
    assert "already built" in capsys.readouterr().out


def test_json_is_the_only_output(scenes: SceneTruth, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    for extra, key in (
        ("--dry-run", "jpegs_error"),
        ("", "samples"),
        ("", "already_built"),
        ("--retry-failed", "recovered"),
    ):
        assert main(words(scenes, out, "--json", *extra.split())) == 0
        value = json.loads(capsys.readouterr().out)
        assert key in value
        assert value["dry_run"] == (extra == "--dry-run")
        assert out.exists() == (extra != "--dry-run")


def test_exit_codes_report_shortfalls(scenes: SceneTruth, tmp_path: Path, capsys: Capture) -> None:
    images = tmp_path / "images"
    shutil.copytree(scenes.images, images)
    more = ("--per-class", "1000", "--eval-per-class", "0", "--images", str(images))
    assert main(words(scenes, tmp_path / "whole", *more)) == 0
    assert "only " in capsys.readouterr().out  # fewer than 1000 at the source: reported, and not a failure
    victim = images / "train" / f"{open_dataset(str(tmp_path / 'whole')).index('train').image_id(0)}.jpg"
    hidden = victim.rename(tmp_path / victim.name)
    command = words(scenes, tmp_path / "out", *more)
    assert main(command) == SHORTFALL == 3
    [packed, wanted, *_] = map(int, re.findall(r"(\d+)(?: of | \(try --retry-failed\))", capsys.readouterr().out))
    assert packed == wanted - 1
    assert main(command) == SHORTFALL  # already built, with the same shortfall
    assert main([*command, "--retry-failed"]) == SHORTFALL
    assert "recovered: nothing" in capsys.readouterr().out
    hidden.rename(victim)
    assert main([*command, "--retry-failed"]) == 0
    assert "recovered: " in capsys.readouterr().out
    assert main(command) == 0


def test_every_command_is_refused_while_a_build_runs(scenes: SceneTruth, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    with BuildLock(Location(str(out))):
        for extra in ([], ["--overwrite"], ["--retry-failed"], ["--dry-run"]):
            assert "another build is " in one_line(capsys, *words(scenes, out, *extra))
    assert main(words(scenes, out)) == 0


class Files(BaseHTTPRequestHandler):
    """A web server for a folder, with byte ranges and without authentication."""

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
    scenes: SceneTruth, tmp_path: Path, capsys: Capture, caplog: pytest.LogCaptureFixture
) -> None:
    """With good and bad web roots that have a user and a password; the log is formatted as the command does."""
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
    printed = capsys.readouterr()
    log = "\n".join(map(RedactingFormatter("%(message)s").format, caplog.records))
    stored = b"".join(path.read_bytes() for path in out.rglob("*") if path.is_file())
    for text in (printed.out, printed.err, log, stored.decode("latin-1")):
        assert "hunter2" not in text
    assert "***@" in printed.err
    assert "***@" in log
