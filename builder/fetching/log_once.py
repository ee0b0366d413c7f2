"""Warnings that are logged once per process, because a build reads some sources several times."""

import logging

logger = logging.getLogger(__name__)
_logged: set[tuple[str, str]] = set()


def warn_once(subject: str, reason: str, message: str) -> None:
    """Log `<subject>: <message>`, unless a warning with the same subject and reason was logged before."""
    if (subject, reason) not in _logged:
        _logged.add((subject, reason))
        logger.warning("%s: %s", subject, message)
