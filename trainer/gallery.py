"""The images of a split that went worst and best, as one self-contained HTML page.

How an image went is told by the F1 of its detections from a score on, matched by the rules of Open Images: what these
leave out (objects without a mask, groups, classes that nobody verified) is neither good nor bad.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from shards.dataset import Category
from shards.sample import Sample
from trainer.metrics import Gather, alone
from trainer.metrics.openimages import RIGHT, WRONG, Matches, Parents, match
from trainer.metrics.overlaps import compute_overlaps
from trainer.pictures import side_by_side

if TYPE_CHECKING:
    from trainer.data import EvalBatch
    from trainer.detect import Detections

LONGEST = 1600  # pixels of a pair of pictures, side by side
STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; } img { width: 100%; height: auto; border-radius: 4px; }
figcaption { font-size: .875rem; overflow-wrap: anywhere; }
"""


@dataclass(frozen=True, slots=True)
class Verdict:
    """How one image went: detections that are right and wrong, objects that were missed."""

    image_id: str
    right: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        """0 to 1; 1 where there was nothing to find and nothing found."""
        total = 2 * self.right + self.wrong + self.missed
        return 2 * self.right / total if total else 1.0

    @property
    def worst_first(self) -> tuple[float, int, str]:
        """Sorts the worst image first; of equal ones that with more errors."""
        return self.f1, -self.wrong - self.missed, self.image_id

    @property
    def best_first(self) -> tuple[float, int, str]:
        """Sorts the best image first; of equal ones that with more objects found."""
        return -self.f1, -self.right, self.image_id


def judge(image_id: str, matches: Matches, score: float) -> Verdict:
    """The verdict on the detections of `score` or more."""
    outcomes = matches.outcomes[matches.scores >= score]
    right = int((outcomes == RIGHT).sum())
    return Verdict(image_id, right, int((outcomes == WRONG).sum()), len(matches.objects) - right)


@dataclass(frozen=True, slots=True)
class _Candidate:
    verdict: Verdict
    pixels: NDArray[np.uint8]
    sample: Sample
    found: Detections


class Gallery:
    """Collects the images of one rank that may be among the worst or best of all.

    Memory: the pixels of at most 2 x `count` images.

    Args:
        categories: the classes.
        parents: see `openimages.Parents`.
        count: how many of the worst and of the best are shown.
        score: detections below it are neither judged nor drawn.
    """

    def __init__(self, categories: Sequence[Category], parents: Parents, count: int, score: float) -> None:
        self.categories, self.parents, self.count, self.score = tuple(categories), parents, count, score
        self.worst: list[_Candidate] = []
        self.best: list[_Candidate] = []

    def add(self, batch: EvalBatch, found: Sequence[Detections]) -> None:
        """Judge a batch; what cannot come onto the page any more is let go."""
        for image, sample, detections in zip(batch.images, batch.samples, found, strict=True):
            matches = match(sample, detections, compute_overlaps(sample.instances, detections), self.parents)
            verdict = judge(sample.image_id, matches, self.score)
            candidate = _Candidate(verdict, image.permute(1, 2, 0).numpy(), sample, detections)
            if verdict.wrong + verdict.missed:
                self.worst = sorted([*self.worst, candidate], key=lambda c: c.verdict.worst_first)[: self.count]
            if verdict.right:
                self.best = sorted([*self.best, candidate], key=lambda c: c.verdict.best_first)[: self.count]

    def page(self, title: str, gather: Gather = alone) -> str | None:
        """The HTML of all ranks' worst and best; None on ranks that `gather` gives nothing."""
        own = [(kind, c.verdict, self._draw(c)) for kind in ("worst", "best") for c in getattr(self, kind)]
        gathered = gather(own)
        if gathered is None:
            return None
        sections = []
        for kind, key in (("worst", "worst_first"), ("best", "best_first")):
            entries = [(verdict, jpeg) for of_kind, verdict, jpeg in gathered if of_kind == kind]
            ranked = sorted(entries, key=lambda entry: getattr(entry[0], key))[: self.count]
            sections.append(_section(f"The {len(ranked)} {kind}", ranked))
        return _page(title, self.score, sections)

    def _draw(self, candidate: _Candidate) -> bytes:
        """A JPEG: what is annotated on the left, what was found on the right."""
        both = side_by_side(candidate.pixels, candidate.sample, candidate.found, self.categories, self.score)
        both.thumbnail((LONGEST, LONGEST))
        buffer = io.BytesIO()
        both.save(buffer, "JPEG", quality=85)
        return buffer.getvalue()


def _page(title: str, score: float, sections: Sequence[str]) -> str:
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>{title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>{title}</h1>
<p>Left: what is annotated; dashed boxes have no mask, hatched ones hold a group. Right: what was found with a score of
{score:g} or more. Images are ranked by the F1 of their detections at mask IoU 0.5; objects without a mask, groups and
classes that nobody verified in the image do not count.</p>
{"".join(sections)}
</body>
</html>
"""


def _section(title: str, ranked: Sequence[tuple[Verdict, bytes]]) -> str:
    figures = []
    for verdict, jpeg in ranked:
        name = html.escape(verdict.image_id)
        data = base64.b64encode(jpeg).decode("ascii")
        figures.append(
            f'<figure><img loading="lazy" alt="{name}: annotated and found" src="data:image/jpeg;base64,{data}">'
            f"<figcaption><b>{name}</b>: F1 {verdict.f1:.2f}, {verdict.right} right, {verdict.wrong} wrong, "
            f"{verdict.missed} missed</figcaption></figure>\n"
        )
    return f'<h2>{html.escape(title)}</h2>\n<div class="grid">\n{"".join(figures)}</div>\n'
