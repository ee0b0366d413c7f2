"""The S3 server of the demo: what clients can do with it, and that it leaves nothing behind."""

import os
import select
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import fsspec
import pytest
import s3fs

from demo.s3server import S3Server
from shards.storage.location import Location
from tests.support import REPOSITORY

linux = pytest.mark.skipif(sys.platform != "linux", reason="needs pidfd and prctl")


def wait_until_gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether the process ends in time."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([descriptor], [], [], seconds)[0])
    finally:
        os.close(descriptor)


def test_signed_clients_read_and_write_with_the_environment(s3: S3Server, bucket: str) -> None:
    code = f"import s3fs; s3fs.S3FileSystem().pipe_file('{bucket}/some/key.bin', b'0123456789')"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("AWS_")}
    subprocess.run([sys.executable, "-c", code], env={**clean, **s3.environment()}, check=True, timeout=60)
    assert s3fs.S3FileSystem().cat_file(f"{bucket}/some/key.bin", start=3, end=6) == b"345"
    with fsspec.open(f"s3://{bucket}/some/key.bin", "rb") as file:
        assert file.read() == b"0123456789"
    with pytest.raises(FileExistsError, match="already has a bucket"):
        s3.make_bucket(bucket)
    with pytest.raises(FileNotFoundError):
        s3.filesystem().pipe_file("never-made/key", b"1")


def test_anonymous_clients_read_and_list_but_do_not_write(s3: S3Server, bucket: str) -> None:
    s3.filesystem().pipe_file(f"{bucket}/key", bytes(range(256)) * 100)
    anonymous = s3fs.S3FileSystem(anon=True, use_listings_cache=False)
    assert anonymous.ls(bucket) == [f"{bucket}/key"]
    with pytest.raises(FileNotFoundError):
        anonymous.cat_file(f"{bucket}/missing")
    with pytest.raises(PermissionError):
        anonymous.pipe_file(f"{bucket}/other", b"no")
    # Over plain http too.
    request = urllib.request.Request(f"{s3.endpoint_url}/{bucket}/key", headers={"Range": "bytes=1000-1009"})
    with urllib.request.urlopen(request, timeout=10) as reply:
        assert (reply.status, reply.headers["Content-Range"]) == (206, "bytes 1000-1009/25600")
        assert reply.read() == anonymous.cat_file(f"{bucket}/key", start=1000, end=1010) == bytes(range(232, 242))


def test_upload_copies_a_tree(s3: S3Server, bucket: str, tmp_path: Path) -> None:
    content = {f"a/{number % 7}/{number}.txt": str(number).encode() for number in range(60)}
    content |= {"top level.txt": b"", "a/ü.txt": b"umlaut"}
    for name, data in content.items():
        Location(f"{tmp_path}/{name}").write(data)
    assert s3.upload(tmp_path, f"{bucket}/copy") == len(content)
    found = s3.filesystem().cat(s3.filesystem().find(bucket))
    assert {key.removeprefix(f"{bucket}/copy/"): data for key, data in found.items()} == content
    with pytest.raises(FileNotFoundError, match="no directory"):
        s3.upload(tmp_path / "nowhere", bucket)


@linux
def test_the_command_prints_exports_and_stopping_leaves_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "demo.s3server", "--dir", str(tmp_path), "--bucket", "play"]
    with subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        lines = [process.stdout.readline() for _ in range(6)]
        exports = dict(line.split()[1].split("=", 1) for line in lines if line.startswith("export "))
        with urllib.request.urlopen(f"{exports['AWS_ENDPOINT_URL']}/play", timeout=10) as reply:
            assert b"ListBucketResult" in reply.read()
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) == 0
    with S3Server(tmp_path) as server:
        pid, sockets = server.pid, server.sockets
        assert all(path.is_socket() for path in sockets)
        assert server.folder.parent == tmp_path
    assert not list(tmp_path.iterdir())
    assert wait_until_gone(pid, 0)
    assert not any(path.exists() for path in sockets)
    with pytest.raises(RuntimeError, match="not running"):
        server.environment()


@linux
def test_a_server_and_a_proxy_process_end_with_a_killed_parent(tmp_path: Path) -> None:
    code = """if True:
        import sys
        from demo.s3proxy import proxy_process
        from demo.s3server import S3Server
        with S3Server(sys.argv[1]) as server, proxy_process(server.endpoint_url) as proxy:
            print(server.pid, proxy["AWS_ENDPOINT_URL"].rpartition(":")[2], *server.sockets, flush=True)
            sys.stdin.read()
    """
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, cwd=REPOSITORY, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        pid, port, *sockets = process.stdout.readline().split()
        with socket.create_connection(("127.0.0.1", int(port)), timeout=20) as connection:
            process.kill()
            assert connection.recv(1) == b""  # closed by the proxy's end
        assert wait_until_gone(int(pid))
    for path in sockets:
        Path(path).unlink()


def test_a_server_that_is_not_ready_in_time_is_a_one_line_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match=r"^[^\n]*not ready after 0\.1 s[^\n]*$"), S3Server(tmp_path, timeout=0.1):
        pass
    assert not list(tmp_path.iterdir())
