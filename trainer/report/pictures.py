"""What the network sees: validation images, ground truth on the left and predictions on the right.

<run>/pictures/step-000100/<ImageID>.jpg
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.drawing.overlay import draw_instances, legible_scale, titled_picture
from shards.format.dataset import Category
from shards.format.sample import Sample
from shards.storage.location import Location
from trainer.data.collate import EvalBatch
from trainer.model.inference import Detections

FOLDER = "pictures"
SHOWN = 0.5  # detections below this score are left out
GAP = 8  # pixels between the two halves


def annotated_and_found(
    pixels: NDArray[np.uint8],
    sample: Sample,
    found: Detections,
    categories: Sequence[Category],
    score: float,
    captions: Sequence[str] | None = None,
) -> tuple[Image.Image, Image.Image]:
    """A picture of what is annotated, and one of the detections of `score` or more; small images are enlarged.

    Args:
        pixels: uint8 (H, W, 3) RGB.
        captions: one a detection of `found`, in place of name and score.
    """
    scale = legible_scale(sample.width, sample.height)
    sure = [i for i, value in enumerate(found.scores) if value >= score]
    instances, scores = found.instances(), found.scores.tolist()
    truth = draw_instances(pixels, sample.instances, categories, scale=scale)
    predicted = draw_instances(
        pixels,
        [instances[i] for i in sure],
        categories,
        scores=[scores[i] for i in sure],
        captions=None if captions is None else [captions[i] for i in sure],
        scale=scale,
    )
    return truth, predicted


def side_by_side(
    pixels: NDArray[np.uint8], sample: Sample, found: Detections, categories: Sequence[Category], score: float
) -> Image.Image:
    """The pictures of `annotated_and_found`, left and right, under a line of text each."""
    truth, predicted = annotated_and_found(pixels, sample, found, categories, score)
    sure = sum(value >= score for value in found.scores.tolist())
    truth = titled_picture(truth, f"annotated: {len(sample.instances)}")
    predicted = titled_picture(predicted, f"predicted with a score of {score:g} or more: {sure}")
    both = Image.new("RGB", (truth.width + GAP + predicted.width, truth.height), "white")
    both.paste(truth, (0, 0))
    both.paste(predicted, (truth.width + GAP, 0))
    return both


class Pictures:
    """Draws the first images of an evaluation: the same ones each time, for the order is fixed.

    Args:
        categories: the classes.
        count: how many images.
    """

    def __init__(self, categories: Sequence[Category], count: int) -> None:
        self.categories, self.count = categories, count
        self.drawn: dict[str, bytes] = {}

    def add(self, batch: EvalBatch, found: Sequence[Detections]) -> None:
        """Draw those of a batch that are still wanted."""
        for image, sample, detections in zip(batch.images, batch.samples, found):
            if len(self.drawn) >= self.count:
                return
            both = side_by_side(image.permute(1, 2, 0).numpy(), sample, detections, self.categories, SHOWN)
            buffer = io.BytesIO()
            both.save(buffer, "JPEG", quality=90)
            self.drawn[sample.image_id] = buffer.getvalue()

    def write(self, run: Location, step: int) -> None:
        """Write what was drawn into the run's folder."""
        for image_id, data in self.drawn.items():
            (run / FOLDER / f"step-{step:06d}" / f"{image_id}.jpg").write(data)
