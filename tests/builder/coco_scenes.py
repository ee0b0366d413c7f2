"""Small datasets in COCO's format, with masks of all kinds: polygons, run lengths of both kinds, crowds, no mask."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as coco_mask

from tests.support import jpeg

CATEGORIES = [
    {"id": 18, "name": "dog", "supercategory": "animal"},
    {"id": 1, "name": "person", "supercategory": "person"},
    {"id": 3, "name": "car", "supercategory": "vehicle"},
    {"id": 8, "name": "truck", "supercategory": "vehicle"},
]
LICENSES = [{"id": 4, "name": "Attribution License", "url": "http://creativecommons.org/licenses/by/2.0/"}]

IMAGE = {"id": 1, "file_name": "a.jpg", "width": 10, "height": 8}


def document(**changes: Any) -> dict[str, Any]:
    """Return an instances file with one image, category and annotation, with other values for some keys."""
    annotation = {"id": 5, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}
    return {"images": [IMAGE], "categories": [{"id": 1, "name": "dog"}], "annotations": [annotation], **changes}


def write_coco(root: Path, *, images: int = 12, seed: int = 0, name: str = "instances.json") -> dict[str, Any]:
    """Write `root/images/part<n>/<file>.jpg` and `root/<name>`, 1 to 5 objects per image; return the JSON's value."""
    rng = np.random.default_rng(seed)
    value: dict[str, Any] = {"images": [], "annotations": [], "categories": CATEGORIES, "licenses": LICENSES}
    for number in range(images):
        width, height = (int(side) for side in rng.integers(40, 90, 2))
        file_name = f"part{number % 2}/picture.{seed}.{number}.jpg"
        (root / "images" / file_name).parent.mkdir(parents=True, exist_ok=True)
        (root / "images" / file_name).write_bytes(jpeg(width, height, seed * 1000 + number))
        image = {"id": 7 * number + 1, "file_name": file_name, "width": width, "height": height, "license": 4}
        value["images"].append({**image, "flickr_url": f"http://example.org/{number}"})
        for _ in range(int(rng.integers(1, 6))):
            annotation = _object(rng, width, height)
            value["annotations"].append(
                {
                    "id": len(value["annotations"]) + 100,
                    "image_id": image["id"],
                    "category_id": int(rng.choice([1, 3, 8, 18])),
                    **annotation,
                }
            )
    (root / name).write_text(json.dumps(value))
    return value


def _object(rng: np.random.Generator, width: int, height: int) -> dict[str, Any]:
    kind = rng.choice(["polygons", "runs", "string", "box"])
    x, y = float(rng.uniform(0, width - 20)), float(rng.uniform(0, height - 20))
    corners = [[x, y], [x + 15.5, y + 1.2], [x + 18, y + 12], [x + 4, y + 17.3]]
    bbox, area = [x, y, 18.0, 17.3], round(15.5 * 17.3, 2)
    if kind == "box":
        return {"bbox": bbox, "iscrowd": 0, "area": area}
    polygons = [[value for corner in corners for value in corner]]
    if kind == "polygons":
        polygons.append([x + 1, y + 1, x + 19.9, y + 19, x + 2, y + 19.9])
        return {"bbox": [x, y, 19.9, 19.9], "segmentation": polygons, "iscrowd": 0}
    compressed = coco_mask.merge(coco_mask.frPyObjects(polygons, height, width))
    if kind == "string":
        counts: Any = compressed["counts"].decode()
    else:
        flat = np.concatenate([[0], coco_mask.decode(compressed).flatten(order="F"), [2]])
        edges = np.flatnonzero(np.diff(flat.astype(np.int8), prepend=0)[1:])
        counts = np.diff(edges, prepend=0).tolist()
    return {"bbox": bbox, "segmentation": {"size": [height, width], "counts": counts}, "iscrowd": int(kind == "runs")}
