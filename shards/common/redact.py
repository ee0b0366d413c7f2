"""Removes credentials from URLs before they are printed or stored.

What is hidden depends on the position in a URL, never on a name: everything before the host, and every value behind the
path. `redact_url` takes a URL, `redact` a text with URLs in it, and `redact_values` JSON. Where the end of a URL in a
text is in doubt, more is hidden: redact values first, then format them.
"""

import logging
import re
from typing import Any

HIDDEN = "***"

_SCHEME = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")
_HOST = re.compile(r"(?:\[[^\]]*\]|[^:]*)(?::\d*)?")  # with its port
# A URL in a text ends before white space, before the quote or bracket that closes the one in front of it, or before
# punctuation that belongs to the sentence.
_CLOSING = {"'": "'", '"': '"', "`": "`", "(": ")", "<": ">", "[": "]", "{": "}"}
_QUOTES = "'\"`"
_PUNCTUATION = ":;,.)]}>'\"`"


def redact(text: str) -> str:
    """Return text with user information and the values of queries and fragments of its URLs replaced by `***`."""
    parts: list[str] = []
    done = 0
    for scheme in _SCHEME.finditer(text):
        if scheme.start() >= done:  # otherwise it is a part of the URL before it
            end = _end(text, scheme.start(), scheme.end())
            parts += [text[done : scheme.start()], redact_url(text[scheme.start() : end])]
            done = end
    return "".join([*parts, text[done:]])


def redact_url(url: str) -> str:
    """Redact a URL, of any characters, or text that ends with one, such as `train=URL`."""
    scheme = _SCHEME.search(url)
    if scheme is None:
        return url
    first, *others = url.split("://")
    address = "://".join([first, *map(_without_user, others)])
    behind = re.search("[?#]", address)
    if behind is None:
        return address
    # In a bucket, a file name may contain a question mark; a web server sees a query there, perhaps a bare token.
    values = address[behind.end() :]
    bare = "=" in values or (behind[0] == "?" and scheme[0].lower() in ("http://", "https://"))
    parameters = re.split("([&#])", values)
    parameters[::2] = [_hidden(parameter, bare=bare) for parameter in parameters[::2]]
    return address[: behind.end()] + "".join(parameters)


def redact_values(value: Any) -> Any:
    """Redact every text in a JSON value, keys of objects included."""
    if isinstance(value, dict):
        return {redact_values(key): redact_values(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [redact_values(item) for item in value]
    if not isinstance(value, str):
        return value
    return redact(value) if re.search(r"\s", value) else redact_url(value)


class RedactingFormatter(logging.Formatter):
    """Formatter of log records, tracebacks included, that redacts them."""

    def format(self, record: logging.LogRecord) -> str:
        """Return the redacted text of a record."""
        return redact(super().format(record))


def _without_user(rest: str) -> str:
    """Return what follows `://` with the user information hidden."""
    authority = re.split("[/?#]", rest, maxsplit=1)[0]
    if "@" in authority:
        return f"{HIDDEN}@{rest[authority.rindex('@') + 1 :]}"
    if "@" in rest and not _HOST.fullmatch(authority):  # no port follows the colon: a password with / ? or #
        return f"{HIDDEN}@{rest[rest.rindex('@') + 1 :]}"
    return rest


def _hidden(parameter: str, *, bare: bool) -> str:
    """Return `name=value` with its value hidden; with `bare`, a parameter without a value is hidden as a whole."""
    name, _, value = parameter.partition("=")
    if value.strip("="):  # otherwise `=` pads a token in base64
        return f"{name}={HIDDEN}"
    return HIDDEN if bare and name else parameter


def _end(text: str, start: int, after: int) -> int:
    """Return where the URL ends that begins at `start`, with `://` before `after`."""
    spaces = re.compile(r"\s").search(text, after)
    end = len(text) if spaces is None else spaces.start()
    opening = text[start - 1 : start]
    if opening in _CLOSING and opening:
        line = len(text) if opening in _QUOTES else end
        closing = re.compile(rf"{re.escape(_CLOSING[opening])}(?=[\s,;:.)\]}}>`'\"]|$)")
        if found := closing.search(text, after, line):
            return found.start()
    while end > after and text[end - 1] in _PUNCTUATION:
        end -= 1
    return end
