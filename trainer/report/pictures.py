"""Pictures of validation images with annotations on the left and detections on the right.

<run>/pictures/step-000100/<ImageID>.jpg
"""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from shards.drawing.label_placement import Colour
from shards.drawing.overlay import draw_instances, legible_scale, titled_picture
from shards.format.dataset import Category
from shards.storage.location import Location
from trainer.metrics.overlaps import EvaluatedImage

FOLDER = "pictures"
SHOWN_SCORE = 0.5  # detections with a lower score are not drawn
TEXT_SCALE = 1.5  # of marks: the page that has them shows pictures small
GAP = 8  # pixels between the two halves


@dataclass(frozen=True)
class Mark:
    """How an annotation or a detection is drawn: its colour, and what is written at it."""

    colour: Colour
    caption: str


def draw_comparison(
    pixels: Tensor,
    image: EvaluatedImage,
    categories: Sequence[Category],
    score: float,
    marks: tuple[Sequence[Mark], Sequence[Mark]] | None = None,
) -> tuple[Image.Image, Image.Image]:
    """Draw the annotations, and the detections with at least a score, on two copies of an image.

    `pixels` is uint8 [3, H, W] RGB; a small image is enlarged. `marks`, one per annotation and one per detection,
    replace the colours of classes, their names and the scores.
    """
    array = np.ascontiguousarray(pixels.permute(1, 2, 0).numpy())  # [H, W, 3]
    scale = legible_scale(image.sample.width, image.sample.height)
    shown = np.flatnonzero(image.detections.scores >= score).tolist()
    instances, scores = image.detections.instances(), image.detections.scores.tolist()
    annotated, found = ({}, {}) if marks is None else (_styles(marks[0]), _styles([marks[1][i] for i in shown]))
    return (
        draw_instances(array, image.sample.instances, categories, scale=scale, **annotated),
        draw_instances(
            array,
            [instances[i] for i in shown],
            categories,
            scores=[scores[i] for i in shown],
            scale=scale,
            **found,
        ),
    )


def _styles(marks: Sequence[Mark]) -> dict[str, Any]:
    colours, captions = [mark.colour for mark in marks], [mark.caption for mark in marks]
    return {"colours": colours, "captions": captions, "text_scale": TEXT_SCALE}


def encode_jpeg(picture: Image.Image, quality: int) -> bytes:
    """Return a picture as JPEG."""
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


class Pictures:
    """Draws the first `count` images of an evaluation, which are the same in every evaluation of a run."""

    def __init__(self, categories: Sequence[Category], count: int) -> None:
        self.categories, self.count = categories, count
        self.drawn: dict[str, bytes] = {}

    def add(self, pixels: Sequence[Tensor], images: Sequence[EvaluatedImage]) -> None:
        """Draw the images of a batch until `count` are drawn."""
        for array, image in zip(pixels, images, strict=True):
            if len(self.drawn) >= self.count:
                return
            annotated, found = draw_comparison(array, image, self.categories, SHOWN_SCORE)
            shown = int((image.detections.scores >= SHOWN_SCORE).sum())
            left = titled_picture(annotated, f"annotated: {len(image.sample.instances)}")
            right = titled_picture(found, f"predicted with a score of {SHOWN_SCORE:g} or more: {shown}")
            both = Image.new("RGB", (left.width + GAP + right.width, left.height), "white")
            both.paste(left, (0, 0))
            both.paste(right, (left.width + GAP, 0))
            self.drawn[image.sample.image_id] = encode_jpeg(both, 90)

    def write(self, run: Location, step: int) -> None:
        """Write the pictures into the folder of a run."""
        for image_id, data in self.drawn.items():
            (run / FOLDER / f"step-{step:06d}" / f"{image_id}.jpg").write(data)
