"""Draw predictions of `make demo` as an SVG: `python tools/result_picture.py demo-out > docs/result.svg`.

Each picture is traced to flat colours; the masks, boxes and scores drawn over it are those in `predictions.json`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from PIL import Image, ImageFilter

from shards.drawing.contours import contours, simplify, svg_path
from shards.drawing.overlay import class_colour
from shards.format import rle

WIDTH, HEIGHT, GAP, COLOURS = 360, 240, 8, 14


def picture(path: Path) -> str:
    """The picture as filled paths of a few colours."""
    image = Image.open(path).convert("RGB").resize((WIDTH, HEIGHT), Image.Resampling.LANCZOS)
    flat = image.filter(ImageFilter.MedianFilter(5)).quantize(COLOURS, dither=Image.Dither.NONE)
    palette, indexes = np.array(flat.getpalette()).reshape(-1, 3), np.array(flat)
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#777"/>']  # under the gaps between simplified paths
    for index in np.argsort(-np.bincount(indexes.ravel())):
        if (indexes == index).any():
            rings = [simplify(ring, 0.6) for ring in contours(indexes == index) if len(ring) > 8]
            colour = "#" + "".join(f"{value:02x}" for value in palette[index])
            parts.append(f'<path fill="{colour}" stroke="{colour}" d="{svg_path(rings)}"/>')
    return "".join(parts)


def detection(found: dict[str, Any], name: str, scale: tuple[float, float]) -> str:
    """The mask, box and score of a detection."""
    bits = rle.decode(rle.Rle.from_json(found["segmentation"]))
    mask = Image.fromarray(bits * 255).resize((WIDTH, HEIGHT))
    red, green, blue = class_colour(found["category_id"])
    colour = f"#{red:02x}{green:02x}{blue:02x}"
    path = svg_path([simplify(ring, 0.5) for ring in contours(np.array(mask) > 127)])
    x, y, width, height = (round(value * factor) for value, factor in zip(found["bbox"], (*scale, *scale)))
    label, top = f"{escape(name)} {found['score']:.2f}", max(y - 3, 9)
    return (
        f'<path fill="{colour}" fill-opacity=".45" stroke="{colour}" stroke-width="1.5" d="{path}"/>'
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" fill="none" stroke="{colour}"/>'
        f'<rect x="{x}" y="{top - 9}" width="{4.7 * len(label) + 4:.0f}" height="12" fill="{colour}"/>'
        f'<text x="{x + 2}" y="{top}">{label}</text>'
    )


def main(folder: Path, numbers: list[int]) -> None:
    """Print the SVG of the numbered pictures, in a row."""
    predictions = json.loads((folder / "predictions" / "predictions.json").read_text(encoding="utf-8"))
    names = {category["id"]: category["name"] for category in predictions["categories"]}
    size = f"{len(numbers) * (WIDTH + GAP) - GAP} {HEIGHT}"
    print(f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {size}" font-family="sans-serif" font-size="9.5">')
    for place, number in enumerate(numbers):
        image = predictions["images"][number]
        path = folder / "scenes" / "open-images-dataset" / "test" / Path(image["file_name"]).name
        scale = WIDTH / image["width"], HEIGHT / image["height"]
        found = [
            each for each in predictions["annotations"] if each["image_id"] == image["id"] and each["score"] >= 0.6
        ]
        shapes = "".join(detection(each, names[each["category_id"]], scale) for each in found)
        inner = f'<svg x="{place * (WIDTH + GAP)}" width="{WIDTH}" height="{HEIGHT}">{picture(path)}{shapes}</svg>'
        print(inner)
    print("</svg>")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(each) for each in sys.argv[2:]] or [0, 1])
