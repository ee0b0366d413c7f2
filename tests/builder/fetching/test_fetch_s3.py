"""Whole objects of S3: one request each, their bytes checked, nothing endless read."""

import pytest

from builder.fetching.fetch import Refusal, Request, fetch
from builder.fetching.traffic import Meter, Traffic
from builder.packing.images import check_jpeg
from demo.s3proxy import Fault, S3Proxy
from demo.s3server import S3Server
from shards.common.errors import StorageError
from shards.storage import ranges
from shards.storage.location import Location


@pytest.fixture
def place(s3: S3Server, bucket: str, monkeypatch: pytest.MonkeyPatch) -> Location:
    monkeypatch.setattr("shards.storage.ranges.BACK_OFF_S", 0.01)
    s3.filesystem().pipe_file(f"{bucket}/a", b"0123456789" * 1000)
    return Location(f"s3://{bucket}/a")


def through(proxy: S3Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.endpoint_url)
    monkeypatch.setattr("shards.storage.location._instances", {})


def test_an_object_costs_one_request(s3: S3Server, place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Proxy(s3.endpoint_url) as proxy:
        through(proxy, monkeypatch)
        meter = Meter()
        assert fetch([Request(place)] * 3, meter) == [b"0123456789" * 1000] * 3
        assert proxy.counters.requests == {"GET": 3}
    assert meter.total == Traffic(3, 30_000)


def test_wrong_bytes_are_read_again(s3: S3Server, place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Proxy(s3.endpoint_url, [Fault("corrupt", "GET", times=1)]) as proxy:
        through(proxy, monkeypatch)
        assert fetch([Request(place)]) == [b"0123456789" * 1000]
        assert proxy.counters.requests["GET"] == 2


def test_bytes_that_come_twice_alike_are_believed(
    s3: S3Server, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A store whose ETags only look like an MD5."""
    monkeypatch.setattr(ranges, "_md5_of", lambda answer: "0" * 32)
    assert fetch([Request(place)]) == [b"0123456789" * 1000]


def test_bytes_that_never_match_are_no_picture(s3: S3Server, place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetch([Request(place)]) == [b"0123456789" * 1000]
    with S3Proxy(s3.endpoint_url, [Fault("corrupt", "GET")]) as proxy:
        through(proxy, monkeypatch)
        # Another endpoint: what its ETags are is learnt anew, from an object that passes.
        proxy.faults = ()
        fetch([Request(place)])
        proxy.faults = (Fault("corrupt", "GET"),)
        assert fetch([Request(place)]) == [Refusal("undecodable")]
    assert getattr(check_jpeg(Refusal("undecodable")), "status", "") == "image-undecodable"


def test_a_huge_object_is_not_read(s3: S3Server, place: Location, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builder.fetching.fetch.OBJECT_BYTES", 9999)
    assert fetch([Request(place)]) == [Refusal("too-large")]
    assert getattr(check_jpeg(Refusal("too-large")), "status", "") == "image-too-large"


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        ({"ETag": '"0123456789abcdef0123456789ABCDEF"'}, "0123456789abcdef0123456789abcdef"),
        ({"ETag": '"0123456789abcdef0123456789abcdef-2"'}, ""),
        ({"ETag": '"0123456789abcdef0123456789abcdef"', "x-amz-server-side-encryption": "aws:kms"}, ""),
        ({}, ""),
    ],
)
def test_only_an_etag_that_is_an_md5_is_taken_for_one(answer: dict, found: str) -> None:
    assert ranges._md5_of(answer) == found


def test_missing_keys_and_buckets_are_told_apart(place: Location) -> None:
    assert fetch([Request(Location(f"{place.url}-gone"))]) == [Refusal("missing")]
    with pytest.raises(StorageError, match="bucket does not exist"):
        fetch([Request(Location("s3://no-such-bucket/a"))])


def test_credentials_that_expire_stop_the_build_and_are_no_fault_of_an_object(
    s3: S3Server, place: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    with S3Proxy(s3.endpoint_url, [Fault("expired", "GET")]) as proxy:
        through(proxy, monkeypatch)
        with pytest.raises(StorageError, match=r"ExpiredToken.*check the credentials"):
            fetch([Request(place)])
        proxy.faults = (Fault("refuse", "GET"),)
        assert fetch([Request(place)]) == [Refusal("refused")]
