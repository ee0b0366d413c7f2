import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.redact import redact

SECRETS = [
    ("https://me:pass@word@host/x.csv", "https://***@host/x.csv"),
    ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
    (
        "https://h/x?X-Amz-Credential=AKIA%2F20&X-Amz-Signature=ab12&part=3",
        "https://h/x?X-Amz-Credential=***&X-Amz-Signature=***&part=3",
    ),
    ("https://h/x?sv=1&sig=abc%3D#top", "https://h/x?sv=***&sig=***#top"),
    ("{'url': 'https://a:b@h/x'} and 'https://c:d@h'", "{'url': 'https://***@h/x'} and 'https://***@h'"),
    ("https://h/x?x-goog-signature=aa&token=bb", "https://h/x?x-goog-signature=***&token=***"),
]
UNCHANGED = ["s3://bucket/a@b/c.jpg", "https://host/x?part=3&design=5", "Zoë <z@x.org> asks: who?", "/data/a b/@c"]


@pytest.mark.parametrize(("text", "safe"), [*SECRETS, *zip(UNCHANGED, UNCHANGED)])
def test_redact_replaces_credentials_only(text: str, safe: str) -> None:
    assert redact(text) == safe
    assert redact(f"error: {text}: cannot be read") == f"error: {safe}: cannot be read"


@given(st.text(max_size=60))
def test_redact_is_idempotent(text: str) -> None:
    once = redact(f"https://{text}")
    assert redact(once) == once
