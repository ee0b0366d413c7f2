import json
import logging

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shards.common.redact import RedactingFormatter, redact, redact_url, redact_values

SECRETS = [
    ("https://me:pass@word@host/x.csv", "https://***@host/x.csv"),
    ("s3://key:secret@bucket/x", "s3://***@bucket/x"),
    ("s3://AKIA:ab/c+d?e#f@bucket/x", "s3://***@bucket/x"),  # as AWS makes secret keys
    ("https://me:it's\"@host:8000/x", "https://***@host:8000/x"),
    ("simplecache::https://me:pass@host/x", "simplecache::https://***@host/x"),
    ("https://proxy/https://me:pass@host/x", "https://proxy/https://***@host/x"),
    ("https://h/x?X-Amz-Credential=AKIA%2F20&part=3", "https://h/x?X-Amz-Credential=***&part=***"),
    ("https://h/x?sv=1&sig=abc%3D#top", "https://h/x?sv=***&sig=***#***"),
    ("https://h/x?apikey=a'b&X-Oss-Signature=c\"d&sas=e", "https://h/x?apikey=***&X-Oss-Signature=***&sas=***"),
    ("s3://bucket/x?any-name-at-all=secret", "s3://bucket/x?any-name-at-all=***"),
    ("https://h/x#access_token=secret&state=1", "https://h/x#access_token=***&state=***"),
    ("https://h/x?c2VjcmV0==", "https://h/x?***"),
    ("HTTPS://h/x?token", "HTTPS://h/x?***"),
]
UNCHANGED = [
    "s3://bucket/a@b/c.jpg",
    "http://[::1]:9000/a@b",
    "https://host/x#part",
    "s3://bucket/what?.jpg",
    "Zoë <z@x.org> asks: who?",
    "/data/a b/@c?d=e",
]
CASES = [*SECRETS, *zip(UNCHANGED, UNCHANGED, strict=True)]


@pytest.mark.parametrize(("url", "safe"), CASES)
def test_redact_hides_by_position_alone(url: str, safe: str) -> None:
    assert redact_url(url) == redact(url) == safe
    assert redact_url(f"train={url}") == f"train={safe}"
    assert redact(f"error: {url}: cannot be read") == f"error: {safe}: cannot be read"
    assert redact(f"({url}), then `{url}`") == f"({safe}), then `{safe}`"
    assert redact_values({"a": [url, 1, None], url: {"b": f"at {url}"}}) == {
        "a": [safe, 1, None],
        safe: {"b": f"at {safe}"},
    }


def test_redact_keeps_what_is_around_a_url() -> None:
    assert redact("{'url': 'https://a:b@h/x?c=d'} and 'https://c:d@h'") == (
        "{'url': 'https://***@h/x?c=***'} and 'https://***@h'"
    )
    assert json.loads(redact(json.dumps(["https://a:b@h/x?c=d", "me@home"]))) == ["https://***@h/x?c=***", "me@home"]
    assert redact("two: s3://a:b@c/d\ns3://e:f@g/h.") == "two: s3://***@c/d\ns3://***@g/h."


def test_redact_url_takes_a_url_with_spaces_as_one() -> None:
    assert redact_url("https://me:pass word@host/x?sig=a b&c=d e") == "https://***@host/x?sig=***&c=***"
    assert redact("'https://me:pass word@host/x' is missing") == "'https://***@host/x' is missing"


def test_redacting_formatter_covers_arguments_and_tracebacks() -> None:
    try:
        raise ValueError("s3://key:secret@bucket")
    except ValueError as error:
        exception = (type(error), error, error.__traceback__)
        record = logging.LogRecord("x", logging.INFO, "", 0, "%s?", ("https://h/?t=secret",), exception)
    assert "secret" not in RedactingFormatter().format(record)


@given(st.text(max_size=60), st.text(max_size=10))
def test_redact_is_idempotent(text: str, before: str) -> None:
    once = redact(f"{before}https://{text}")
    assert redact(once) == once


@given(st.text(st.characters(exclude_categories=["Z", "C"], exclude_characters="@&/")))
def test_no_user_or_value_survives_whatever_its_characters(characters: str) -> None:
    secret = f"s3cret{characters}s3cret"
    for url in (f"https://me:{secret}@host/x", f"https://host/x?name={secret}", f"s3://bucket/x?y=1&z={secret}"):
        assert "s3cret" not in redact_url(url)
        assert "s3cret" not in redact(f"{url} is missing")
