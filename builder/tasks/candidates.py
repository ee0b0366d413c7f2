"""The images of a source that count for a class."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Candidates:
    """Images that count for a class: those with a mask of it, and those that only have boxes of it; disjoint."""

    masked: tuple[str, ...] = ()
    boxed: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.masked) + len(self.boxed)
