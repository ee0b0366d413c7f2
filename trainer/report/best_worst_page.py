"""A self-contained HTML page of the images of a split with the worst and the best results.

Images are ranked by the F1 of their detections with at least a given score, matched by the rules of Open Images:
detections that these ignore (on objects without a mask, in groups, of unverified classes) count neither way.
"""

import base64
import html
from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter

import numpy as np
from PIL import Image
from torch import Tensor

from shards.common.html_page import fill_page
from shards.common.text import counted
from shards.drawing.label_placement import Colour
from shards.drawing.overlay import FOUND, MISSED, SUPERFLUOUS, UNCOUNTED
from shards.format.dataset import Category
from trainer.metrics.metric import Gather, single_process
from trainer.metrics.openimages import RIGHT, WRONG, Matches, Parents, match
from trainer.metrics.overlaps import EvaluatedImage
from trainer.model.inference import Detections
from trainer.report.pictures import Mark, draw_comparison, encode_jpeg
from trainer.report.scorecard import Evaluation, class_scores, in_percent

LONGER_SIDE = 800  # pixels of a picture
NO_IMAGES = {"worst": "an error", "best": "a right detection"}
OPEN_TABLE = 12  # most classes for which the table is unfolded

LEGEND = {
    FOUND: "found: an object with its detection",
    MISSED: "missed: an object without a detection",
    SUPERFLUOUS: "wrong: a detection without an object",
    UNCOUNTED: "(in brackets): does not count",
}
COLUMNS = {
    "name": "class",
    "objects": "objects",
    "masks": "masks",
    "box_ap": "box AP",
    "mask_ap": "mask AP",
    "mask_ap50": "mask AP50",
    "open_images_ap": "Open Images AP50",
}


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


@dataclass(frozen=True, slots=True, order=True)
class _Figure:
    html: str
    classes: tuple[int, ...]  # annotated or found in the image


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

    def render(self, title: str, evaluation: Evaluation | None = None, gather: Gather = single_process) -> bytes | None:
        """Return the page with the worst and best images of all ranks; None where `gather` returns None."""
        own = [(kind, c.score, self._figure(c)) for kind, kept in self._candidates.items() for c in kept]
        gathered = gather(own)
        if gathered is None:
            return None
        sections, present = [], set[int]()
        for kind, nothing in NO_IMAGES.items():
            entries = sorted((getattr(score, kind), figure) for of_kind, score, figure in gathered if of_kind == kind)
            figures = [figure for _, figure in entries[: self.count]]
            present.update(*(figure.classes for figure in figures))
            sections.append(_section(kind, nothing, [figure.html for figure in figures]))
        parts = {
            "title": html.escape(title),
            "score": f"{self.score:g}",
            "table": "" if evaluation is None else _table(evaluation),
            "legend": "".join(f"<li>{_swatch(colour)}{text}</li>" for colour, text in LEGEND.items()),
            "classes": _options(self.categories, present),
            "sections": "".join(sections) if self.count else "<p>None: --pictures is 0.</p>",
        }
        return fill_page("trainer.report", parts)

    def _figure(self, candidate: _Candidate) -> _Figure:
        """Return an image of the page: what is annotated next to what was found."""
        score, found, sample = candidate.score, candidate.image.detections, candidate.image.sample
        names = {category.id: category.name for category in self.categories}
        marks = (
            annotation_marks(candidate.image, candidate.matches, names, self.score),
            detection_marks(found, candidate.matches, names),
        )
        pictures = draw_comparison(candidate.pixels, candidate.image, self.categories, self.score, marks)
        annotated = [instance.category_id for instance in sample.instances]
        detected = found.labels[found.scores >= self.score].tolist()
        texts = (
            f"annotated: {count_classes(annotated, self.categories)}",
            f"found: {count_classes(detected, self.categories)}",
        )
        name, classes = html.escape(score.image_id), tuple(sorted({*annotated, *detected}))
        return _Figure(
            f'<figure data-classes="{" ".join(map(str, classes))}">'
            f'<label class="pair"><input type="checkbox" aria-label="enlarge {name}">'
            f"{''.join(_half(name, picture, text) for picture, text in zip(pictures, texts, strict=True))}</label>\n"
            f"<figcaption><b>{name}</b>: F1 {score.f1:.2f}, {score.right} right, {score.wrong} wrong, "
            f"{score.missed} missed</figcaption></figure>\n",
            classes,
        )


def annotation_marks(image: EvaluatedImage, matches: Matches, names: Mapping[int, str], score: float) -> list[Mark]:
    """Return how each annotation is drawn: found by a detection with at least `score`, missed, or not counted."""
    overlaps = image.overlaps
    # With a hierarchy, a detection counts for several classes: here, that of the annotation.
    own = matches.labels == overlaps.labels[matches.annotations] if len(overlaps.labels) else np.empty(0, bool)
    found = set(matches.annotations[own & (matches.outcomes == RIGHT) & (matches.scores >= score)].tolist())
    marks = []
    for i, instance in enumerate(image.sample.instances):
        name = names.get(instance.category_id, f"class {instance.category_id}")
        if instance.is_group_of or not overlaps.masked[i]:
            marks.append(Mark(UNCOUNTED, f"({name} group)" if instance.is_group_of else f"({name})"))
        else:
            marks.append(Mark(FOUND, name) if i in found else Mark(MISSED, f"{name} missed"))
    return marks


def detection_marks(found: Detections, matches: Matches, names: Mapping[int, str]) -> list[Mark]:
    """Return how each detection is drawn, with its name and score: right, wrong, or not counted."""
    rows = zip(matches.detections.tolist(), matches.labels.tolist(), matches.outcomes.tolist(), strict=True)
    outcomes = {i: outcome for i, label, outcome in rows if label == found.labels[i]}
    marks = []
    for i, (label, score) in enumerate(zip(found.labels.tolist(), found.scores.tolist(), strict=True)):
        text, outcome = f"{names.get(label, f'class {label}')} {score:.2f}", outcomes.get(i)
        if outcome == RIGHT:
            marks.append(Mark(FOUND, text))
        else:
            marks.append(Mark(SUPERFLUOUS, f"{text} wrong") if outcome == WRONG else Mark(UNCOUNTED, f"({text})"))
    return marks


def count_classes(labels: Iterable[int], categories: Sequence[Category]) -> str:
    """Return text such as `2 × Person, Car`, in the order of the categories; `nothing` without labels."""
    counts = Counter(labels)
    present = [(counts[category.id], category.name) for category in categories if counts[category.id]]
    return ", ".join(f"{count} × {name}" if count > 1 else name for count, name in present) or "nothing"


def _section(kind: str, nothing: str, figures: Sequence[str]) -> str:
    """Return the images of one kind with the buttons that turn their pages, which the script shows."""
    title = f"The {len(figures)} {kind}" if len(figures) > 1 else f"The {kind}"
    if not figures:
        return f'<div class="heading"><h3>{title}</h3></div>\n<p>No image has {nothing}.</p>\n'
    return (
        f'<section aria-label="{title}"><div class="heading"><h3>{title}</h3><div class="pager" hidden>'
        '<button type="button" value="-1" aria-label="previous page">←</button><output></output>'
        '<button type="button" value="1" aria-label="next page">→</button></div></div>\n'
        f'<p class="nothing" hidden>None of them has this class.</p>\n<div class="images">\n{"".join(figures)}</div>'
        "</section>\n"
    )


def _options(categories: Sequence[Category], present: Collection[int]) -> str:
    """Return the choices of the class filter: the classes on the page, by name."""
    shown = sorted((category.name, category.id) for category in categories if category.id in present)
    options = "".join(f'<option value="{number}">{html.escape(name)}</option>' for name, number in shown)
    return f'<option value="">all</option>{options}'


def _table(evaluation: Evaluation) -> str:
    """Return the table of the classes, AP in per cent, folded if it is long; its last row is the mean."""
    table = class_scores(evaluation)
    box, mask = evaluation.coco.bbox, evaluation.coco.segm
    rows = table[list(COLUMNS)].values.tolist()
    counts = [evaluation.coco.boxes, evaluation.coco.masks]
    rows.append(["mean", *counts, box.ap, mask.ap, mask.ap50, evaluation.open_images.ap])
    head = "".join(f'<th scope="col">{title}</th>' for title in COLUMNS.values())
    body = "".join(
        f'<tr><th scope="row">{html.escape(str(name))}</th><td>{objects}</td><td>{masks}</td>'
        f"{''.join(f'<td>{in_percent(value)}</td>' for value in values)}</tr>\n"
        for name, objects, masks, *values in rows
    )
    attribute = " open" if len(table) <= OPEN_TABLE else ""
    return (
        f"<details{attribute}><summary>AP of {counted(len(table), 'class', 'classes')}"
        f"</summary>\n<table><caption>In per cent; the last column is the Open Images metric.</caption>\n"
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></details>\n"
    )


def _swatch(colour: Colour) -> str:
    red, green, blue = colour
    return (
        f'<svg viewBox="0 0 1 1" aria-hidden="true"><rect width="1" height="1" fill="rgb({red},{green},{blue})"/></svg>'
    )


def _half(name: str, picture: Image.Image, text: str) -> str:
    """Return one picture of a pair above its description; `name` is HTML already."""
    picture.thumbnail((LONGER_SIDE, LONGER_SIDE))
    shows, data = html.escape(text), base64.b64encode(encode_jpeg(picture, 85)).decode("ascii")
    return (
        f'<span><img loading="lazy" width="{picture.width}" height="{picture.height}" alt="{name}, {shows}" '
        f'src="data:image/jpeg;base64,{data}"><span class="what">{shows}</span></span>\n'
    )
