"""Output files of predictions: a COCO dataset with scores, the submission to the Open Images Challenge, pictures.

The submission has the format of the Challenge's instance segmentation track of 2019
(https://www.kaggle.com/c/open-images-2019-instance-segmentation/overview/evaluation): a CSV with the columns `ImageID`,
`ImageWidth`, `ImageHeight` and `PredictionString`, which is `LabelName Confidence EncodedMask` for each object,
separated by spaces. EncodedMask is base64 of zlib of the ASCII counts of COCO's RLE, as decoded by TensorFlow's
`object_detection/metrics/oid_challenge_evaluation_utils.py`.
"""

from __future__ import annotations

import base64
import csv
import io
import json
import shutil
import tempfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from shards.common.errors import UserError
from shards.common.text import counted
from shards.storage.explain import storage_errors
from shards.storage.local_files import atomic_write
from shards.storage.location import Location

if TYPE_CHECKING:
    from torch import Tensor

    from shards.format.dataset import Category
    from trainer.model.inference import Detections

COCO_FILE = "predictions.json"
SUBMISSION_FILE = "submission.csv"
COLUMNS = ("ImageID", "ImageWidth", "ImageHeight", "PredictionString")
JPEG_QUALITY = 92

Labels = Mapping[int, Sequence[str]]  # category id -> the MIDs it is submitted as: its own, then its ancestors'


def image_record(image_id: str, file_name: str, width: int, height: int, found: Detections) -> dict[str, Any]:
    """Return `image_id`, COCO's entry `image` and COCO's `annotations`, with scores, of an image, without their ids."""
    from shards.format import rle

    annotations = [
        {
            "category_id": instance.category_id,
            "bbox": [round(value, 2) for value in instance.bbox],
            "score": round(score, 5),
            "segmentation": mask.to_json(),
            "area": rle.area(mask),
            "iscrowd": 0,
        }
        for instance, mask, score in zip(found.instances(), found.masks, found.scores.tolist(), strict=True)
    ]
    image = {"file_name": file_name, "width": width, "height": height}
    return {"image_id": image_id, "image": image, "annotations": annotations}


def submission_labels(categories: Sequence[Category], parents: Mapping[int, Sequence[int]]) -> dict[int, list[str]]:
    """Return the MIDs that each class is submitted as: its own and, as the Challenge requires, its ancestors'."""
    mids = {category.id: category.mid for category in categories}
    for category in categories:
        if not category.mid:
            raise UserError(f"--submission: class {category.name} has no MID, by which Open Images identifies classes")
    return {number: [mid, *(mids[above] for above in parents.get(number, ()))] for number, mid in mids.items()}


def prediction_string(annotations: Iterable[Mapping[str, Any]], labels: Labels) -> str:
    """Return `LabelName Confidence EncodedMask` of each annotation under each of its labels, separated by spaces."""
    parts = []
    for one in annotations:
        counts = one["segmentation"]["counts"].encode("ascii")
        mask = base64.b64encode(zlib.compress(counts, zlib.Z_BEST_COMPRESSION)).decode("ascii")
        parts += [f"{label} {one['score']:g} {mask}" for label in labels[one["category_id"]]]
    return " ".join(parts)


class PredictionFiles:
    """Context manager that writes predictions.json and submission.csv, image by image, in constant memory.

    The files appear whole at the end of the `with` block, or not at all after an exception. Without `labels` there is
    no submission.
    """

    def __init__(self, out: Location, categories: Sequence[Category], labels: Labels | None) -> None:
        self.images = self.objects = 0
        self._out, self._categories, self._labels = out, categories, labels

    def __enter__(self) -> PredictionFiles:
        self._stack = ExitStack()
        self._folder = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="maskstream-"))
        self._coco = self._open(COCO_FILE)
        self._annotations = self._open("annotations")
        self._coco.write('{"images":[')
        if self._labels is not None:
            self._submission = self._open(SUBMISSION_FILE)
            self._rows = csv.writer(self._submission, lineterminator="\n")
            self._rows.writerow(COLUMNS)
        return self

    def add(self, record: Mapping[str, Any]) -> None:
        """Add an image from `image_record`; ids count from 1 in the order of the calls."""
        self._coco.write("," if self.images else "")
        self.images += 1
        self._coco.write(_dump({"id": self.images, **record["image"]}))
        for one in record["annotations"]:
            self._annotations.write("," if self.objects else "")
            self.objects += 1
            self._annotations.write(_dump({"id": self.objects, "image_id": self.images, **one}))
        if self._labels is not None:
            image = record["image"]
            string = prediction_string(record["annotations"], self._labels)
            self._rows.writerow((record["image_id"], image["width"], image["height"], string))

    def counts(self) -> str:
        """Return what was added so far, such as `3 objects in 1 image`."""
        return f"{counted(self.objects, 'object')} in {counted(self.images, 'image')}"

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with self._stack:
            if kind is not None:
                return
            categories = [{"id": c.id, "name": c.name, "mid": c.mid} for c in self._categories]
            self._coco.write(f'],"categories":{_dump(categories)},"annotations":[')
            self._annotations.seek(0)
            shutil.copyfileobj(self._annotations, self._coco)
            self._coco.write("]}")
            self._coco.close()
            _publish(f"{self._folder}/{COCO_FILE}", self._out / COCO_FILE)
            if self._labels is not None:
                self._submission.close()
                _publish(f"{self._folder}/{SUBMISSION_FILE}", self._out / SUBMISSION_FILE)

    def _open(self, name: str) -> Any:
        file = open(f"{self._folder}/{name}", "w+", encoding="utf-8", newline="")  # noqa: SIM115
        return self._stack.enter_context(file)


def write_picture(place: Location, pixels: Tensor, found: Detections, categories: Sequence[Category]) -> None:
    """Write an image, uint8 [3, H, W] RGB, with its detections as JPEG."""
    from shards.drawing.overlay import draw_instances, legible_scale

    height, width = pixels.shape[-2:]
    picture = draw_instances(
        pixels.permute(1, 2, 0).contiguous().numpy(),
        found.instances(),
        categories,
        scores=found.scores.tolist(),
        scale=legible_scale(width, height),
    )
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # keeps thin coloured lines sharp
    place.write(buffer.getvalue())


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _publish(source: str, place: Location) -> None:
    """Copy a file of any length to its place, whole or not at all."""
    with storage_errors(place.url):
        if not place.is_local:
            place.fs.put_file(source, place.path)
            return
        with open(source, "rb") as original, atomic_write(place.path) as file:
            shutil.copyfileobj(original, file)
