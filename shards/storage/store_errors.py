"""Errors of reads, and what obstore raises turned into them."""

import re

from shards.common.text import one_line


class TransientError(OSError):
    """An error that may pass: 5xx, 429, 408, or a body that ended early."""


class UnreachableError(TransientError):
    """No connection to the server."""


class WrongBytesError(TransientError):
    """The bytes do not match the store's checksum."""


class WrongRegionError(TransientError):
    """The bucket is in another region than that of the request: in `region`, "" if the answer does not say."""

    def __init__(self, message: str, region: str = "") -> None:
        super().__init__(message)
        self.region = region


class ReplacedError(OSError):
    """The object no longer has the ETag of the read."""


class TooLargeError(OSError):
    """The object is longer than the read allows."""


class BeyondEndError(OSError):
    """The object ends before the range begins."""


class NoCredentialsError(PermissionError):
    """No credentials were found."""


class NoRangesError(OSError):
    """The server ignores byte ranges."""


_STATUS = re.compile(r"non-2xx status code: (\d{3}) ?([^:]*)(?:: (.*))?", re.DOTALL)
# In the debug output of an error that is not a status: the innermost reason.
_REASON = re.compile(r'(?:message|error): "([^"]+)"')
_OTHER_RANGE = re.compile(r"Requested (\d+)\.\.(\d+), got (\d+)\.\.(\d+)")
_NO_TOKEN = re.compile(r"credential provider: (?:PermissionError|NoCredentialsError): (.*)", re.DOTALL)
_NO_RANGES = ("Received non-partial response", "Range request not supported", "Content-Range header not present")
_NO_BUCKET = {
    "NoSuchBucket": "The specified bucket does not exist",
    "ContainerNotFound": "The specified container does not exist",
}
RETRIED = (408, 429)  # and 5xx


def as_os_error(error: Exception, url: str) -> OSError:
    """Return the `OSError` for what obstore raised when it read `url`; others are raised again."""
    kind = type(error)
    if isinstance(error, OSError) and not isinstance(error, FileNotFoundError):
        return error
    if not isinstance(error, FileNotFoundError) and not kind.__module__.startswith("obstore"):
        raise error
    text, _, debug = str(error).partition("\n\nDebug source:")
    if found := _STATUS.search(text):
        return _of_status(int(found[1]), found[2], found[3] or "", url)
    if isinstance(error, FileNotFoundError):
        return FileNotFoundError(url)
    if found := _NO_TOKEN.search(text):
        return PermissionError(one_line(found[1]))
    if "redirect without LOCATION" in text:
        return WrongRegionError("HTTP 301 without an address, which usually means another region")
    if any(sign in text for sign in _NO_RANGES):
        return NoRangesError("the server ignores byte ranges, without which nothing can be read from it")
    reasons = _REASON.findall(debug)
    if "kind: Connect" in debug:
        return UnreachableError(reasons[-1] if reasons else "it cannot be connected to")
    if "TimedOut" in debug:
        return TransientError("the answer took too long")
    if found := _OTHER_RANGE.search(text):
        return TransientError("requested bytes {} to {}, got {} to {}".format(*found.groups()))
    return TransientError(one_line(reasons[-1] if reasons else text.rsplit(" - ", 1)[-1]))


def _of_status(status: int, name: str, body: str, url: str) -> OSError:
    names = ("Code", "Message", "Details", "Region")
    fields = {field: found[1] for field in names if (found := re.search(rf"<{field}>([^<]*)</", body))}
    code = fields.get("Code", name.strip())
    message = fields.get("Message", "").partition("RequestId:")[0]  # of Azure, with a time
    reason = one_line(f"HTTP {status} {code}: {message} {fields.get('Details', '')}").rstrip(": ")
    if status in (404, 410):
        return FileNotFoundError(_NO_BUCKET.get(code, url))
    if status == 412:
        return ReplacedError("the object is no longer the one that was described")
    if status == 416:
        return BeyondEndError("the object ends before the range begins")
    if code in ("AuthorizationHeaderMalformed", "PermanentRedirect") or (status == 400 and not body):
        return WrongRegionError(reason, fields.get("Region", ""))
    if 400 <= status < 500 and status not in RETRIED:
        return PermissionError(reason)  # ExpiredToken is a 400: renewable credentials have been renewed before
    return TransientError(reason)
