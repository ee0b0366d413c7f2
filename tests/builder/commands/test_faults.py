import itertools
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from builder.target import build_lock
from builder.target.build_lock import LOCK_FILE
from demo.s3proxy import Fault, Kind, S3Proxy, Seen
from demo.s3server import S3Server
from demo.scenes import SceneTruth
from shards.common.errors import UserError
from shards.format.dataset import open_dataset
from shards.storage.location import Location
from tests.builder.builds import ANNOTATIONS, IMAGES, accounts_of, build, quotas, s3_mirror, tree
from tests.support import REPOSITORY, Proxied

PER_CLASS = 12
CHOICE = quotas(("Person", "Car", "Traffic light", "Traffic sign"), PER_CLASS, 0, images_per_shard=3)
KILLED: dict[str, Any] = {"sent": signal.SIGKILL, "status": -signal.SIGKILL}
# `build-shards`, which takes over the lock of a killed build without the wait that `test_build_lock.py` shows.
COMMAND = """
import sys
from builder.commands.cli import main
from builder.target import build_lock
build_lock.SETTLE_S = 0.0
sys.exit(main())
"""
TRANSIENT: tuple[Kind, ...] = ("slow_down", "internal_error", "reset", "truncate", "stall")


@pytest.fixture(autouse=True)
def _no_wait_for_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(build_lock, "SETTLE_S", 0.0)


@pytest.fixture
def faulty(s3_scenes: SceneTruth, proxied: Proxied, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Proxied:
    """The fixture `proxied` with a short time limit and an empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    # The objects of Open Images have no checksums; those of the test do.
    monkeypatch.setenv("AWS_RESPONSE_CHECKSUM_VALIDATION", "when_required")
    return partial(proxied, timeout_s=0.5)


@pytest.fixture
def target(s3: S3Server) -> Iterator[str]:
    """An empty bucket with a constant name, because `Fault.share` chooses requests by their keys."""
    s3.make_bucket("faulty-target")
    yield "faulty-target"
    s3.filesystem().rm("faulty-target", recursive=True)


@pytest.fixture(scope="module")
def unbroken(s3_scenes: SceneTruth, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("unbroken") / "out"
    build(s3_mirror(), CHOICE, Location(str(root)))
    return root


def files(root: Path) -> dict[str, bytes]:
    return tree(root, without="README.md")  # the card contains --out


def s3_files(s3: S3Server, root: str, to: Path) -> dict[str, bytes]:
    s3.filesystem().get(root, str(to), recursive=True)
    return files(to)


@pytest.mark.slow
def test_transient_faults_at_sources_and_target_do_not_change_the_dataset(
    s3: S3Server, target: str, unbroken: Path, faulty: Proxied, tmp_path: Path
) -> None:
    with faulty(*(Fault(kind, share=0.04) for kind in TRANSIENT)) as proxy:
        summary = build(s3_mirror(), CHOICE, Location(f"s3://{target}/out"))
    assert set(proxy.counters.faults) == set(TRANSIENT)
    assert summary.failures == ()
    assert s3_files(s3, f"{target}/out", tmp_path / "got") == files(unbroken)


@pytest.mark.parametrize("damaged", [r"\.jpg$", r"\.zip$", r"/out/"], ids=["images", "masks", "target"])
def test_bytes_damaged_in_transit_are_transferred_again(
    s3: S3Server, target: str, unbroken: Path, faulty: Proxied, tmp_path: Path, damaged: str
) -> None:
    """Checked by the ETag (MD5) of images, the CRC of zip members, and the signed SHA-256 of uploads.

    Only while packing, because tables and zip directories are read in ranges, which have no checksums.
    """

    def when_packing(seen: Seen) -> None:
        if seen.method == "PUT" and seen.key.endswith(".build/plan.json"):
            proxy.faults = (Fault("corrupt", "GET|PUT", damaged, share=0.3),)

    with faulty(on_request=when_packing) as proxy:
        summary = build(s3_mirror(), CHOICE, Location(f"s3://{target}/out"))
    assert proxy.counters.faults["corrupt"] > 0
    assert summary.failures == ()
    assert s3_files(s3, f"{target}/out", tmp_path / "got") == files(unbroken)


@pytest.mark.parametrize("method", [".*", "GET"])
def test_permanent_faults_are_in_the_accounts_and_do_not_affect_other_images(
    unbroken: Path, faulty: Proxied, tmp_path: Path, method: str
) -> None:
    before = {row["image_id"]: row for row in open_dataset(str(unbroken)).table.to_pylist()}
    ids = sorted(before)
    bad = {ids[1]: "image-missing", ids[5]: "image-missing", ids[8]: "image-refused", ids[4]: "image-undecodable"}
    faults = [Fault("missing", method, f"{ids[1]}|{ids[5]}"), Fault("refuse", method, ids[8])]
    faults += [Fault("corrupt", "GET", f"{ids[4]}.jpg", after=0.0)]
    with faulty(*faults) as proxy:
        summary = build(s3_mirror(), CHOICE, Location(str(tmp_path / "out")))
    rows = accounts_of(tmp_path / "out")
    images = {row["image_id"]: row["status"] for row in rows if row["kind"] == "image"}
    assert {image_id: images[image_id] for image_id in ids} == dict.fromkeys(ids, "packed") | bad
    assert set(images) > set(ids)  # replacements
    for row in rows:
        if row["kind"] == "mask":
            assert row["status"] == ("image-failed" if row["image_id"] in bad else "packed")
    table = open_dataset(str(tmp_path / "out")).table.to_pylist()
    assert {row["image_id"]: row["crc32"] for row in table if row["image_id"] in before} == {
        image_id: row["crc32"] for image_id, row in before.items() if image_id not in bad
    }
    assert dict(summary.failures)["image-missing"] == 2
    requests = Counter(seen.key.rpartition("/")[2].removesuffix(".jpg") for seen in proxy.requests)
    assert 1 < proxy.counters.faults["corrupt"] < 30
    assert max(requests[image_id] for image_id in bad if image_id != ids[4]) <= 3  # the others are not retried


@pytest.mark.parametrize("kind", ["expired", "refuse"])
def test_a_target_that_cannot_be_written_is_one_line_and_the_build_can_be_resumed(
    s3: S3Server, target: str, unbroken: Path, faulty: Proxied, tmp_path: Path, kind: Kind
) -> None:
    root = Location(f"s3://{target}/out")
    with faulty(Fault(kind, "PUT", r"train/000001\.tar")) as proxy:
        with pytest.raises(UserError, match=r"^[^\n]*train/000001\.tar[^\n]*$"):
            build(s3_mirror(), CHOICE, root)
        assert not s3.filesystem().exists(f"{target}/out/dataset.json")
        proxy.faults = ()
        assert build(s3_mirror(), CHOICE, root).resumed > 0
    assert s3_files(s3, f"{target}/out", tmp_path / "got") == files(unbroken)


@pytest.mark.timeout(20)
def test_a_store_that_does_not_answer_uploads_is_an_error(target: str, faulty: Proxied) -> None:
    """It accepts connections but sends nothing, not even `100 Continue`."""
    with faulty(Fault("stall", "PUT", after=0.0)):
        with pytest.raises(UserError, match=f"{target}/object"):
            Location(f"s3://{target}/object").write(b"1")


@pytest.mark.slow
@pytest.mark.parametrize(("place", "workers"), [("local", 2), ("s3", 1)])
def test_a_build_killed_at_any_request_is_resumed_with_the_same_bytes(
    s3: S3Server, target: str, unbroken: Path, tmp_path: Path, place: str, workers: int
) -> None:
    root = f"s3://{target}/out" if place == "s3" else str(tmp_path / "out")
    for at_request in (23, 4):
        signalled_build(s3, root, workers, at_request=at_request, **KILLED)
    build(s3_mirror(), CHOICE, Location(root))
    assert (s3_files(s3, f"{target}/out", tmp_path / "got") if place == "s3" else files(Path(root))) == files(unbroken)


@pytest.mark.slow
def test_an_overwriting_build_killed_at_any_request_is_resumed(
    s3: S3Server, target: str, unbroken: Path, tmp_path: Path
) -> None:
    root = tmp_path / "out"
    build(s3_mirror(), CHOICE | {"seed": 1}, Location(str(root)))
    assert files(root) != files(unbroken)
    for at_request in (1, 23):
        signalled_build(s3, str(root), 1, "--overwrite", at_request=at_request, **KILLED)
    build(s3_mirror(), CHOICE, Location(str(root)), overwrite=True)
    assert files(root) == files(unbroken)


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_releases_the_lock_and_the_same_command_resumes(
    s3: S3Server, target: str, unbroken: Path, tmp_path: Path, sent: signal.Signals
) -> None:
    root = tmp_path / "out"
    errors = signalled_build(s3, str(root), 2, at_request=22, sent=sent, status=130)
    assert "Traceback" not in errors, errors
    assert errors.splitlines()[-1].endswith("run the same command again to resume")
    assert not (root / LOCK_FILE).exists()
    assert build(s3_mirror(), CHOICE, Location(str(root))).resumed > 0
    assert files(root) == files(unbroken)


def signalled_build(
    s3: S3Server, root: str, workers: int, *more: str, at_request: int, sent: signal.Signals, status: int
) -> str:
    """Run the command, send it a signal at its n-th request for an image or at the target, and return its stderr."""
    counted = itertools.count(1)  # its steps are atomic, and the proxy has a thread for each connection

    def count(seen: Seen) -> None:
        if not seen.key.startswith("openimages/") and next(counted) == at_request:
            os.kill(process.pid, sent)

    words = f"--per-class {PER_CLASS} --eval-per-class 0 --workers {workers}"
    words += f" --images-per-shard {CHOICE['images_per_shard']} --images {IMAGES} --annotations {ANNOTATIONS}"
    command = [sys.executable, "-c", COMMAND, *words.split(), "--out", root, *more]
    with S3Proxy(s3.endpoint_url, on_request=count) as proxy:
        environment = {**os.environ, **proxy.environment()}
        process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, text=True)
        _, errors = process.communicate()  # returns when the workers, which share its stderr, have exited, too
    assert process.returncode == status, errors
    return errors
