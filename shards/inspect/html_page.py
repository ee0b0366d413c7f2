"""One self-contained page: the counts of a dataset, and some of its samples with their masks and boxes.

The page loads nothing: style, script and pictures are in it, and its Content-Security-Policy forbids everything else.
All that comes from the data is JSON in a block that no browser runs, and becomes text by the script's `textContent`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Sequence
from dataclasses import asdict
from importlib.resources import files
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shards.common.errors import SampleError
from shards.drawing.contours import Points, contours, simplify, svg_path
from shards.drawing.overlay import class_colour
from shards.format import rle
from shards.format.dataset import Dataset
from shards.format.sample import FLAGS, Instance, Sample
from shards.inspect.preview_samples import choose, read_samples
from shards.inspect.statistics import SplitCounts, totals

# What one sample takes of the page. Base64 makes four bytes of three: 100 kB a sample, 5 MB for 48.
SIDE = 640  # pixels, the longer side of a picture
PICTURE_BYTES = 56_000
OUTLINE_BYTES = 24_000
TOLERANCES = (1.0, 2.0, 4.0, 8.0, 16.0)  # pixels of the small picture; the next where outlines would take more
QUALITIES = (80, 70, 60, 50, 40)


def make_page(dataset: Dataset, splits: Sequence[SplitCounts], *, samples: int, seed: int = 0) -> bytes:
    """The page as UTF-8.

    Args:
        dataset: where samples are read from.
        splits: its counts.
        samples: how many to show, chosen by `shards.inspect.preview_samples.choose`.
        seed: another one shows others.

    Raises:
        SampleError: a sample cannot be had or is damaged.
    """
    rows = choose(dataset, samples, seed)
    cards = {row: _card(row.split, sample) for row, sample in read_samples(dataset, rows)}
    data = {
        "root": str(dataset.root),
        "plan": dataset.info.plan,
        "seed": seed,
        "flags": [flag.removeprefix("is_").replace("_", "-") for flag in FLAGS],
        "classes": [
            {"id": category.id, "name": category.name, "mid": category.mid, "colour": _hex(category.id)}
            for category in dataset.categories
        ],
        "splits": [asdict(split) for split in splits],
        "all": [asdict(row) for row in totals(splits)],
        "samples": [cards[row] for row in rows],
    }
    return _fill(str(dataset.root), data)


def _fill(title: str, data: dict[str, Any]) -> bytes:
    folder = files("shards.inspect") / "page"
    template, style, script = ((folder / name).read_text("utf-8") for name in ("page.html", "page.css", "page.js"))
    policy = (
        f"default-src 'none'; img-src data:; style-src '{_digest(style)}'; script-src '{_digest(script)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    # `<` cannot end the block, nor begin a comment in it.
    text = json.dumps(data, separators=(",", ":")).replace("<", "\\u003c").replace(">", "\\u003e")
    parts = {"title": html.escape(title), "policy": policy, "style": style, "script": script, "data": text}
    # In one pass: what is filled in is not looked through again.
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], template).encode()


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _hex(category_id: int) -> str:
    return "#{:02x}{:02x}{:02x}".format(*class_colour(category_id))


def _card(split: str, sample: Sample) -> dict[str, Any]:
    """What the page knows of a sample; boxes and outlines in pixels of the small picture."""
    picture, jpeg = small_picture(sample)
    scale_x, scale_y = picture[0] / sample.width, picture[1] / sample.height
    return {
        "id": sample.image_id,
        "split": split,
        "width": sample.width,
        "height": sample.height,
        "rotation": sample.rotation,
        "picture": "data:image/jpeg;base64," + base64.b64encode(jpeg).decode(),
        "size": picture,
        "present": sample.verified_present,
        "absent": sample.verified_absent,
        **{name: getattr(sample, name) for name in ("title", "author", "author_url", "license", "original_url")},
        "objects": [
            {
                "class": instance.category_id,
                "label": instance.label,
                "box": [round(v, 1) for v in np.multiply(instance.bbox, (scale_x, scale_y) * 2).tolist()],
                "outline": outline,
                "share": _share(instance, sample),
                "iou": None if instance.predicted_iou is None else round(instance.predicted_iou, 2),
                "flags": [number for number, flag in enumerate(FLAGS) if getattr(instance, flag)],
            }
            for instance, outline in zip(sample.instances, _outlines(sample, picture))
        ],
    }


def small_picture(sample: Sample) -> tuple[tuple[int, int], bytes]:
    """Its size (width, height) and a JPEG of at most `PICTURE_BYTES` of a sample's picture, without its metadata.

    Raises:
        SampleError: the sample's JPEG cannot be decoded.
    """
    try:
        with Image.open(io.BytesIO(sample.image), formats=("JPEG",)) as opened:
            opened.draft("RGB", (SIDE, SIDE))  # decodes large pictures at a fraction, of at least this size
            picture = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = " ".join(str(error).split())
        raise SampleError(f"sample {sample.image_id}: {sample.image_id}.jpg cannot be decoded: {reason}") from error
    side = min(SIDE, max(sample.width, sample.height))
    while True:
        size = _within(sample.width, sample.height, side)
        small = picture.resize(size, Image.Resampling.LANCZOS)
        for quality in QUALITIES:
            buffer = io.BytesIO()
            small.save(buffer, "JPEG", quality=quality, optimize=True)
            if buffer.tell() <= PICTURE_BYTES:
                return size, buffer.getvalue()
        side = side * 3 // 4


def _within(width: int, height: int, side: int) -> tuple[int, int]:
    scale = side / max(width, height)
    return max(round(width * scale), 1), max(round(height * scale), 1)


def _outlines(sample: Sample, size: tuple[int, int]) -> list[str]:
    """An SVG path an annotation, "" where it has no mask; coarser where there are many."""
    rings = [
        [] if instance.segmentation is None else contours(small_mask(instance.segmentation, size))
        for instance in sample.instances
    ]
    for tolerance in TOLERANCES:
        paths = [svg_path(simplify(ring, tolerance) for ring in _large(own, tolerance)) for own in rings]
        if sum(map(len, paths)) <= OUTLINE_BYTES:
            break
    return paths


def _large(rings: Sequence[Points], tolerance: float) -> list[Points]:
    """Without the parts and holes that the tolerance would swallow; the largest part stays."""
    extents = [int(np.ptp(ring, axis=0).max()) for ring in rings]
    return [ring for ring, extent in zip(rings, extents) if extent > tolerance or extent == max(extents)]


def small_mask(mask: rle.Rle, size: tuple[int, int]) -> NDArray[np.bool_]:
    """(h, w) of a mask at another size; an object that is there at all keeps a pixel."""
    full = Image.fromarray(rle.decode(mask) * np.uint8(255))
    pixels = np.asarray(full.resize(size, Image.Resampling.BOX))
    return pixels >= (128 if (pixels >= 128).any() else max(int(pixels.max()), 1))


def _share(instance: Instance, sample: Sample) -> float | None:
    """Of the image that the mask takes, 0 to 1; None without a mask."""
    if instance.segmentation is None:
        return None
    return round(rle.area(instance.segmentation) / (sample.width * sample.height), 4)
