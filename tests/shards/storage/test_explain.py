import pickle

import pytest

from shards.common.errors import StorageError
from shards.storage.explain import explain

ConnectError = type("ConnectError", (Exception,), {"__module__": "httpx"})  # no OSError
DnsError = type("ClientConnectorDNSError", (type("ClientConnectorError", (OSError,), {}),), {})


@pytest.mark.parametrize(
    ("error", "url", "message"),
    [
        (PermissionError(13, "denied"), "/data/a", "check the permissions of the file and its folder"),
        (PermissionError(13, "denied"), "s3://bucket/a", "check the credentials and the bucket's policy"),
        (TimeoutError(), "s3://bucket/a", "s3://bucket/a: TimeoutError: no further reason was given"),
        (OSError("two\nlines"), "/a", "/a: OSError: two lines"),
        (ConnectError("Name or service not known"), "hf://datasets/a/b", "the endpoint cannot be reached"),
        (DnsError("Cannot connect to host nowhere:443"), "s3://bucket/a", "the endpoint cannot be reached"),
    ],
)
def test_an_error_becomes_one_line_with_a_remedy(error: Exception, url: str, message: str) -> None:
    assert message in str(explain(error, url))
    assert explain(KeyError("a"), url) is None  # of the program, not of storage


def test_a_storage_error_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(StorageError("gone", permanent=True)))  # noqa: S301 (our own bytes, made here)
    assert (str(error), error.permanent) == ("gone", True)
