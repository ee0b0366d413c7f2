"""No credential of a URL is ever printed or stored."""

from __future__ import annotations

import re

# `scheme://user:password@host`: everything before the last @ of the authority. Neither quotes nor spaces are crossed,
# so that JSON and shell words stay whole.
_USER = re.compile(r"(?<=://)[^\s/?#'\"]+@")
# Query parameters that sign or authorise: AWS (V2, V4), Google and Azure name them so.
_QUERY = re.compile(
    r"([?&](?:X-(?:Amz|Goog)-[A-Za-z-]+|AWSAccessKeyId|GoogleAccessId|Signature|Expires|Policy|Key-Pair-Id|sig|se|sp|sv"
    r"|token|access_token|key|api_key|password)=)[^&\s'\"#]*[^&\s'\"#:;,.)]",
    re.IGNORECASE,
)


def redact(text: str) -> str:
    """The text with users, passwords and signatures in its URLs replaced by `***`; all else as it was."""
    return _QUERY.sub(r"\1***", _USER.sub("***@", text))
