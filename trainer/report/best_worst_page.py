"""A self-contained HTML page of the images of a split with the worst and the best results.

Images are ranked by the F1 of their detections with at least a given score, matched by the rules of Open Images:
detections that these ignore (on objects without a mask, in groups, of unverified classes) count neither way.
"""

import base64
import html
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import attrgetter

from PIL import Image
from torch import Tensor

from shards.format.dataset import Category
from trainer.metrics.metric import Gather, single_process
from trainer.metrics.openimages import RIGHT, WRONG, Matches, Parents, match
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections
from trainer.report.pictures import draw_comparison, encode_jpeg

LONGER_SIDE = 800  # pixels of a picture
NO_IMAGES = {"worst": "an error", "best": "a right detection"}
STYLE = """
:root { color-scheme: light dark; font: 16px/1.45 system-ui, sans-serif; }
body { margin: 0 auto; max-width: 1500px; padding: 1rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .75rem; }
p { margin: .5rem 0; max-width: 90ch; } .title { font-weight: 600; }
.grid { display: grid; gap: 1.5rem 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 440px), 1fr)); }
figure { margin: 0; } figure:has(:checked) { grid-column: 1 / -1; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: 6px; position: relative; cursor: zoom-in; }
.pair:has(:checked) { cursor: zoom-out; } .pair:has(:focus-visible) { outline: 3px solid #2f7de1; outline-offset: 3px; }
.pair input { position: absolute; opacity: 0; }
img { display: block; width: 100%; height: auto; border-radius: 4px; }
.pair span, figcaption { display: block; font-size: .875rem; }
.what { opacity: .75; } .what, figcaption, .title { unicode-bidi: isolate; } figcaption { margin-top: .15rem; }
@media (max-width: 700px) {
  .pair { grid-template-columns: 1fr; cursor: auto; } .pair input, .enlarge { display: none; }
}
"""


@dataclass(frozen=True, slots=True)
class ImageScore:
    """Number of right and wrong detections in an image, and of missed objects."""

    image_id: str
    right: int
    wrong: int
    missed: int

    @property
    def f1(self) -> float:
        """F1, 0 to 1; 1 if there is no object and no detection."""
        total = 2 * self.right + self.wrong + self.missed
        return 2 * self.right / total if total else 1.0

    @property
    def worst(self) -> tuple[float, int, str]:
        """Sort key, the worst image first; of equal ones the one with more errors."""
        return self.f1, -self.wrong - self.missed, self.image_id

    @property
    def best(self) -> tuple[float, int, str]:
        """Sort key, the best image first; of equal ones the one with more objects found."""
        return -self.f1, -self.right, self.image_id


def score_image(image_id: str, matches: Matches, score: float) -> ImageScore:
    """Count the detections with at least this score."""
    outcomes = matches.outcomes[matches.scores >= score]
    right = int((outcomes == RIGHT).sum())
    return ImageScore(image_id, right, int((outcomes == WRONG).sum()), len(matches.objects) - right)


@dataclass(frozen=True, slots=True)
class _Candidate:
    score: ImageScore
    pixels: Tensor
    image: EvaluatedImage
    matches: Matches


class BestWorstPage:
    """Collects the images of one rank that may be among the `count` worst or best of all.

    Detections with a lower score than `score` are neither counted nor drawn. Memory: the pixels of at most 2 x `count`
    images.
    """

    def __init__(self, categories: Sequence[Category], parents: Parents, count: int, score: float) -> None:
        self.categories, self.parents, self.count, self.score = tuple(categories), parents, count, score
        self._candidates: dict[str, list[_Candidate]] = {"worst": [], "best": []}

    def add(self, pixels: Sequence[Tensor], images: Sequence[EvaluatedImage]) -> None:
        """Add a batch, with pixels uint8 [3, H, W] RGB; images that can no longer get onto the page are dropped."""
        for array, image in zip(pixels, images, strict=True):
            matches = match(image, self.parents)
            score = score_image(image.sample.image_id, matches, self.score)
            candidate = _Candidate(score, array, image, matches)
            for kind, eligible in (("worst", score.wrong + score.missed), ("best", score.right)):
                if eligible:
                    kept = sorted([*self._candidates[kind], candidate], key=attrgetter(f"score.{kind}"))
                    self._candidates[kind] = kept[: self.count]

    def render(self, title: str, gather: Gather = single_process) -> str | None:
        """Return the page with the worst and best images of all ranks; None where `gather` returns None."""
        own = [(kind, c.score, self._figure(c)) for kind, kept in self._candidates.items() for c in kept]
        gathered = gather(own)
        if gathered is None:
            return None
        sections = []
        for kind, nothing in NO_IMAGES.items():
            entries = sorted((getattr(score, kind), figure) for of_kind, score, figure in gathered if of_kind == kind)
            figures = [figure for _, figure in entries[: self.count]]
            if figures:
                heading = f"The {len(figures)} {kind}" if len(figures) > 1 else f"The {kind}"
                sections.append(f'<h2>{heading}</h2>\n<div class="grid">\n{"".join(figures)}</div>\n')
            elif self.count:
                sections.append(f"<h2>The {kind}</h2>\n<p>No image has {nothing}.</p>\n")
        return _page(title, self.score, sections)

    def _figure(self, candidate: _Candidate) -> str:
        """Return the HTML of an image: what is annotated next to what was found."""
        score, found = candidate.score, candidate.image.detections
        captions = outcome_captions(found, candidate.matches, self.categories)
        pictures = draw_comparison(candidate.pixels, candidate.image, self.categories, self.score, captions)
        annotated = count_classes((i.category_id for i in candidate.image.sample.instances), self.categories)
        detected = count_classes(found.labels[found.scores >= self.score].tolist(), self.categories)
        texts = f"annotated: {annotated}", f"found: {detected}"
        name = html.escape(score.image_id)
        return (
            f'<figure><label class="pair"><input type="checkbox" aria-label="enlarge {name}">'
            f"{''.join(_half(name, picture, text) for picture, text in zip(pictures, texts, strict=True))}</label>\n"
            f"<figcaption><b>{name}</b>: F1 {score.f1:.2f}, {score.right} right, {score.wrong} wrong, "
            f"{score.missed} missed</figcaption></figure>\n"
        )


def outcome_captions(found: Detections, matches: Matches, categories: Sequence[Category]) -> list[str]:
    """Return a caption per detection: name, score, and `wrong` if it is; in brackets if it does not count."""
    names = {category.id: category.name for category in categories}
    rows = zip(matches.detections.tolist(), matches.labels.tolist(), matches.outcomes.tolist(), strict=True)
    outcomes = {i: outcome for i, label, outcome in rows if label == found.labels[i]}
    captions = []
    for i, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
        text, outcome = f"{names.get(label, f'class {label}')} {score:.2f}", outcomes.get(i)
        captions.append(text if outcome == RIGHT else f"{text} wrong" if outcome == WRONG else f"({text})")
    return captions


def count_classes(labels: Iterable[int], categories: Sequence[Category]) -> str:
    """Return text such as `2 × Person, Car`, in the order of the categories; `nothing` without labels."""
    counts = Counter(labels)
    present = [(counts[category.id], category.name) for category in categories if counts[category.id]]
    return ", ".join(f"{count} × {name}" if count > 1 else name for count, name in present) or "nothing"


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
<p class="title">{title}</p>
<p>Images are ranked by the F1 of their detections at mask IoU 0.5. Annotated: boxes without a mask are dashed, groups
hatched; neither counts. Found: detections with a score of {score:g} or more; those in brackets do not count, because
they are on such a box or group, or their class is not verified in the image.</p>
<p class="enlarge">Click a pair of pictures to enlarge it, or use Tab and Space.</p>
{"".join(sections)}
</body>
</html>
"""


def _half(name: str, picture: Image.Image, text: str) -> str:
    """Return one picture of a pair above its description; `name` is HTML already."""
    picture.thumbnail((LONGER_SIDE, LONGER_SIDE))
    shows, data = html.escape(text), base64.b64encode(encode_jpeg(picture, 85)).decode("ascii")
    return (
        f'<span><img loading="lazy" width="{picture.width}" height="{picture.height}" alt="{name}, {shows}" '
        f'src="data:image/jpeg;base64,{data}"><span class="what">{shows}</span></span>\n'
    )
