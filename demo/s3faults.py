"""The faults that `S3Proxy` injects, and what it records of a request."""

import re
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Kind = Literal["slow_down", "internal_error", "refuse", "missing", "expired", "reset", "truncate", "stall", "corrupt"]


@dataclass(frozen=True, slots=True)
class Fault:
    """A fault of some requests.

    `slow_down` (503), `internal_error` (500), `refuse` (403), `missing` (404) and `expired` (400) are S3's own answers;
    the requests never reach the store. The others break a body: of a PUT or POST, or else of the answer.

    - `reset`: part of the body, then the connection is reset (RST).
    - `truncate`: part of the body, then the connection is closed normally, although Content-Length announced more.
    - `stall`: part of the body, then nothing until the client gives up.
    - `corrupt`: the whole body with one byte inverted; an empty one passes unchanged.

    An upload that is reset, truncated or stalled never reaches the store; with `after=1` it does, and only its answer
    is lost. If there is no body, the connection ends before the answer.

    Attributes:
        method, key: regular expressions for the whole method and for a part of `bucket/key`.
        times: limit of affected requests per key. None: no limit.
        share: fraction of the matching requests, 0 to 1, chosen by a hash of the proxy's seed, the request, and the
            number of identical requests before: neither order nor concurrency matters.
        every: affect every n-th of the matching requests that no earlier fault affects, in the order of arrival.
        after: fraction of the body, 0 to 1, that passes unchanged. With 0 an upload is not even requested.

    Raises:
        ValueError: an unknown kind or a number out of its range.
        re.error: not a regular expression.
    """

    kind: Kind
    method: str = ".*"
    key: str = ""
    times: int | None = None
    share: float = 1.0
    every: int = 1
    after: float = 0.5

    def __post_init__(self) -> None:
        if self.kind not in get_args(Kind):
            raise ValueError(f"Fault: kind {self.kind!r} is none of {', '.join(get_args(Kind))}")
        if not (0 <= self.share <= 1 and 0 <= self.after <= 1 and (self.times or 0) >= 0 and self.every >= 1):
            raise ValueError(f"{self}: share and after are between 0 and 1, times is 0 or more, every is 1 or more")
        re.compile(self.method), re.compile(self.key)


class Seen(NamedTuple):
    """A request; `range` is `bytes=0-99`, or `part=3` of an upload in parts, or ""; `status` 0 means unanswered."""

    method: str
    key: str  # bucket/key
    range: str
    status: int = 0
