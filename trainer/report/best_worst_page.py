"""The images of a split that went worst and best, as one self-contained HTML page.

How an image went is told by the F1 of its detections from a score on, matched by the rules of Open Images: what these
leave out (objects without a mask, groups, classes that nobody verified) is neither good nor bad.
"""

from __future__ import annotations

import base64
import html
import io
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.format.dataset import Category
from shards.format.sample import Sample
from trainer.metrics import Gather, alone
from trainer.metrics.openimages import RIGHT, WRONG, Matches, Parents, match
from trainer.metrics.overlaps import compute_overlaps
from trainer.report.pictures import annotated_and_found

if TYPE_CHECKING:
    from trainer.data.collate import EvalBatch
    from trainer.model.inference import Detections

LONGEST = 800  # pixels of a picture
STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .75rem; }
p { margin: .5rem 0; max-width: 90ch; } .rated { font-weight: 600; }
.grid { display: grid; gap: 1.5rem 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; } figure:has(:checked) { grid-column: 1 / -1; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; position: relative; cursor: zoom-in; }
.pair:has(:checked) { cursor: zoom-out; } .pair:has(:focus-visible) { outline: 3px solid #2f7de1; outline-offset: 3px; }
.pair input { position: absolute; opacity: 0; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
.pair span, figcaption { display: block; font-size: .875rem; }
.what { opacity: .75; } .what, figcaption, .rated { unicode-bidi: isolate; } figcaption { margin-top: .15rem; }
@media (max-width: 700px) {
  .pair { grid-template-columns: 1fr; cursor: auto; } .pair input, .enlarge { display: none; }
}
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
    matches: Matches


@dataclass(frozen=True, slots=True)
class _Picture:
    """A picture as it travels between ranks: a JPEG, its size, and what is drawn on it in words."""

    jpeg: bytes
    width: int
    height: int
    shows: str


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
            candidate = _Candidate(verdict, image.permute(1, 2, 0).numpy(), sample, detections, matches)
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
        for kind, key, nothing in (("worst", "worst_first", "an error"), ("best", "best_first", "a right detection")):
            entries = [(verdict, pictures) for of_kind, verdict, pictures in gathered if of_kind == kind]
            ranked = sorted(entries, key=lambda entry: getattr(entry[0], key))[: self.count]
            if ranked:
                sections.append(_section(f"The {len(ranked)} {kind}" if len(ranked) > 1 else f"The {kind}", ranked))
            elif self.count:
                sections.append(f"<h2>The {kind}</h2>\n<p>No image has {nothing}.</p>\n")
        return _page(title, self.score, sections)

    def _draw(self, candidate: _Candidate) -> tuple[_Picture, _Picture]:
        """What is annotated, and what was found."""
        sample, found = candidate.sample, candidate.found
        captions = told_outcomes(found, candidate.matches, self.categories)
        pictures = annotated_and_found(candidate.pixels, sample, found, self.categories, self.score, captions)
        annotated = (instance.category_id for instance in sample.instances)
        shows = (
            f"annotated: {count_classes(annotated, self.categories)}",
            f"found: {count_classes(found.labels[found.scores >= self.score].tolist(), self.categories)}",
        )
        one, other = (_encode(picture, words) for picture, words in zip(pictures, shows, strict=True))
        return one, other


def told_outcomes(found: Detections, matches: Matches, categories: Sequence[Category]) -> list[str]:
    """A caption for each detection: name and score, and whether it is wrong; in brackets what does not count."""
    names = {category.id: category.name for category in categories}
    rows = zip(matches.detections.tolist(), matches.labels.tolist(), matches.outcomes.tolist(), strict=True)
    outcomes = {place: outcome for place, label, outcome in rows if label == found.labels[place]}
    captions = []
    for place, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
        text, outcome = f"{names.get(label, f'class {label}')} {score:.2f}", outcomes.get(place)
        captions.append(text if outcome == RIGHT else f"{text} wrong" if outcome == WRONG else f"({text})")
    return captions


def count_classes(labels: Iterable[int], categories: Sequence[Category]) -> str:
    """Such as `2 × Person, Car`, in the order of the categories; `nothing` for none."""
    counts = Counter(labels)
    told = [(counts[category.id], category.name) for category in categories if counts[category.id]]
    return (
        ", ".join(f"{count} \N{MULTIPLICATION SIGN} {name}" if count > 1 else name for count, name in told) or "nothing"
    )


def _encode(picture: Image.Image, shows: str) -> _Picture:
    picture.thumbnail((LONGEST, LONGEST))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=85)
    return _Picture(buffer.getvalue(), *picture.size, shows)


def _page(title: str, score: float, sections: Sequence[str]) -> str:
    title = html.escape(title)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>Worst and best images: {title}</title>
<style>{STYLE}</style>
</head>
<body>
<h1>Worst and best images</h1>
<p class="rated">{title}</p>
<p>Images are ranked by the F1 of their detections at mask IoU 0.5. Annotated: boxes without a mask are dashed, groups
hatched; neither counts. Found: detections with a score of {score:g} or more; those in brackets do not count, for they
lie on such a box or group, or nobody verified their class in the image.</p>
<p class="enlarge">A pair of pictures is enlarged by a click, or by Tab and Space.</p>
{"".join(sections)}
</body>
</html>
"""


def _section(title: str, ranked: Sequence[tuple[Verdict, tuple[_Picture, _Picture]]]) -> str:
    figures = []
    for verdict, pictures in ranked:
        name = html.escape(verdict.image_id)
        figures.append(
            f'<figure><label class="pair"><input type="checkbox" aria-label="enlarge {name}">'
            f"{''.join(_half(name, picture) for picture in pictures)}</label>\n"
            f"<figcaption><b>{name}</b>: F1 {verdict.f1:.2f}, {verdict.right} right, {verdict.wrong} wrong, "
            f"{verdict.missed} missed</figcaption></figure>\n"
        )
    return f'<h2>{html.escape(title)}</h2>\n<div class="grid">\n{"".join(figures)}</div>\n'


def _half(name: str, picture: _Picture) -> str:
    """One picture of a pair, over its words; `name` is HTML already."""
    shows, data = html.escape(picture.shows), base64.b64encode(picture.jpeg).decode("ascii")
    return (
        f'<span><img loading="lazy" width="{picture.width}" height="{picture.height}" alt="{name}, {shows}" '
        f'src="data:image/jpeg;base64,{data}"><span class="what">{shows}</span></span>\n'
    )
