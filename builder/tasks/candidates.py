"""The images that a source offers for a class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidates:
    """Images that count for a class, each once: those with a mask of it, and those with nothing but boxes of it."""

    masked: tuple[str, ...] = ()
    boxed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.masked) + len(self.boxed)
