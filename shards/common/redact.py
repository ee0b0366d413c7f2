"""Removes credentials from URLs before they are printed or stored."""

import re

# `scheme://user:password@host`: everything before the last @ of the authority. Quotes and spaces end a match, so that
# JSON and shell words stay valid.
_USER = re.compile(r"(?<=://)[^\s/?#'\"]+@")
# Query parameters by which AWS (V2, V4), Google and Azure sign or authorise.
_QUERY = re.compile(
    r"([?&](?:X-(?:Amz|Goog)-[A-Za-z-]+|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id|sig|se|sp|sv"
    r"|token|access_token|key|api_key|password)=)[^&\s'\"#]*[^&\s'\"#:;,.)]",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """Return text with the users, passwords and signatures in its URLs replaced by `***`."""
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))
