"""A self-contained HTML page with the counts of a dataset and a gallery of samples with their masks and boxes.

Style, script and pictures are embedded, and the Content-Security-Policy forbids everything else. Text of the dataset is
JSON in a block that no browser executes; the script shows it by `textContent` only.
"""

import base64
import html
import io
import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
from PIL import Image

from shards.common.html_page import fill_page
from shards.common.redact import redact_url
from shards.drawing.contours import Points, contours, simplify, svg_path
from shards.drawing.overlay import PALETTE, fitted_size, hex_colour
from shards.drawing.thumbnail import decode_at_least, small_mask
from shards.format import rle
from shards.format.dataset import Dataset
from shards.format.sample import ATTRIBUTION, FLAGS, Sample
from shards.inspect.preview_samples import choose, read_samples
from shards.inspect.statistics import COUNTS, FLAG_NAMES, SplitCounts, totals

# Limits per sample. Base64 makes four bytes out of three: 100 kB per sample, 5 MB for 48.
SIDE = 640  # pixels, the longer side of a picture
PICTURE_BYTES = 56_000
OUTLINE_BYTES = 24_000
TOLERANCES = (1.0, 2.0, 4.0, 8.0, 16.0)  # pixels of the small picture; the first that keeps the limit
INSTANCE_COLOURS = len(PALETTE) - 2  # the last two can hardly be seen on the black of the mask pane
QUALITIES = (80, 70, 60, 50, 40)


def make_page(dataset: Dataset, splits: Sequence[SplitCounts], *, samples: int, seed: int = 0) -> bytes:
    """Return the page in UTF-8, with a gallery of `samples` images that a hash with the seed chooses."""
    rows = choose(dataset, samples, seed)
    cards = {row: _card(row.split, sample) for row, sample in read_samples(dataset, rows)}
    data: dict[str, Any] = {
        "root": redact_url(str(dataset.root)),
        "plan": dataset.info.plan,
        "seed": seed,
        "flags": list(FLAG_NAMES.values()),
        "classes": [{**asdict(category), "colour": hex_colour(category.id)} for category in dataset.categories],
        "colours": [hex_colour(number) for number in range(1, INSTANCE_COLOURS + 1)],
        "splits": [split.to_json() for split in splits],
        "all": totals(splits)[["id", "name", *COUNTS]].to_dict("records"),
        "samples": [cards[row] for row in rows],
    }
    # Without a `<`, no text can end the block or begin a comment in it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    return fill_page("shards.inspect", {"title": html.escape(data["root"]), "data": text})


def _card(split: str, sample: Sample) -> dict[str, Any]:
    """Return a sample as the page shows it; boxes and outlines are in pixels of the small picture."""
    picture, jpeg = small_picture(sample)
    scale = (picture[0] / sample.width, picture[1] / sample.height)
    pixels = sample.width * sample.height
    return {
        "id": sample.image_id,
        "split": split,
        "picture": "data:image/jpeg;base64," + base64.b64encode(jpeg).decode(),
        "size": picture,
        "present": sample.verified_present,
        "absent": sample.verified_absent,
        "partial": sample.not_exhaustive,
        **{name: getattr(sample, name) for name in ("width", "height", "rotation", *ATTRIBUTION)},
        "objects": [
            {
                "class": instance.category_id,
                "label": instance.label,
                "box": [round(v, 1) for v in np.multiply(instance.bbox, scale * 2).tolist()],
                "outline": outline,
                "share": None if (mask := instance.segmentation) is None else round(rle.area(mask) / pixels, 4),
                "prediction": instance.prediction and asdict(instance.prediction),
                "iou": None if instance.predicted_iou is None else round(instance.predicted_iou, 2),
                "flags": [number for number, flag in enumerate(FLAGS) if getattr(instance, flag)],
            }
            for instance, outline in zip(sample.instances, _outlines(sample, picture))
        ],
    }


def small_picture(sample: Sample) -> tuple[tuple[int, int], bytes]:
    """Return the picture as a JPEG of at most `PICTURE_BYTES` without metadata, after its size (width, height)."""
    picture = decode_at_least(sample.image, (SIDE, SIDE))
    side = min(SIDE, max(sample.width, sample.height))
    while True:
        size = fitted_size(sample.width, sample.height, side)
        small = picture.resize(size, Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            if len(jpeg := buffer.getvalue()) <= PICTURE_BYTES:
                return size, jpeg
        side = side * 3 // 4


def _outlines(sample: Sample, size: tuple[int, int]) -> list[str]:
    """Return an SVG path per annotation, "" without a mask, simplified until all of them keep the limit."""
    masks = [instance.segmentation for instance in sample.instances]
    rings = [[] if mask is None else contours(small_mask(mask, size)) for mask in masks]
    for tolerance in TOLERANCES:
        paths = [svg_path(simplify(ring, tolerance) for ring in _large(own, tolerance)) for own in rings]
        if sum(map(len, paths)) <= OUTLINE_BYTES:
            break
    return paths


def _large(rings: Sequence[Points], tolerance: float) -> list[Points]:
    """Omit parts and holes that are smaller than the tolerance, but never the largest part."""
    extents = [int(np.ptp(ring, axis=0).max()) for ring in rings]
    return [ring for ring, extent in zip(rings, extents) if extent > tolerance or extent == max(extents)]
