"""What was found, as files: a COCO dataset with scores, the Open Images Challenge's submission, pictures.

The submission's format is that of the Challenge's instance segmentation track of 2019, which takes results at Kaggle
(https://www.kaggle.com/c/open-images-2019-instance-segmentation/overview/evaluation): a CSV with the columns `ImageID`,
`ImageWidth`, `ImageHeight` and `PredictionString`, the latter `LabelName Confidence EncodedMask` for each object, all
parted by spaces. EncodedMask is base64 of zlib of the ASCII counts of COCO's RLE; TensorFlow's
`object_detection/metrics/oid_challenge_evaluation_utils.py` decodes the same.
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
    from shards.format.sample import Instance
    from trainer.model.inference import Detections

COCO_FILE = "predictions.json"
SUBMISSION_FILE = "submission.csv"
COLUMNS = ("ImageID", "ImageWidth", "ImageHeight", "PredictionString")
JPEG_QUALITY = 92

Labels = Mapping[int, Sequence[str]]  # the MIDs under which a class is submitted: its own, then its ancestors'


def image_record(image_id: str, file_name: str, width: int, height: int, found: Detections) -> dict[str, Any]:
    """All that the files tell of an image: `image_id`, `image` (COCO's entry) and `annotations`; `id`s come later."""
    return {
        "image_id": image_id,
        "image": {"file_name": file_name, "width": width, "height": height},
        "annotations": [
            annotation(instance, float(score)) for instance, score in zip(found.instances(), found.scores, strict=True)
        ],
    }


def annotation(instance: Instance, score: float) -> dict[str, Any]:
    """A detection as a COCO annotation with a score, which is also COCO's form of a result."""
    from shards.format import rle

    mask = instance.segmentation
    assert mask is not None  # every detection has one
    return {
        "category_id": instance.category_id,
        "bbox": [round(value, 2) for value in instance.bbox],
        "score": round(score, 5),
        "segmentation": mask.to_json(),
        "area": rle.area(mask),
        "iscrowd": 0,
    }


def submission_labels(categories: Sequence[Category], parents: Mapping[int, Sequence[int]]) -> dict[int, list[str]]:
    """The MIDs that each class is submitted as: its own and those of its ancestors, which the Challenge asks for.

    Raises:
        UserError: a class without a MID.
    """
    mids = {category.id: category.mid for category in categories}
    for category in categories:
        if not category.mid:
            raise UserError(f"--submission: class {category.name} has no MID, by which Open Images knows its classes")
    return {number: [mid, *(mids[above] for above in parents.get(number, ()))] for number, mid in mids.items()}


def prediction_string(annotations: Iterable[Mapping[str, Any]], labels: Labels) -> str:
    """`LabelName Confidence EncodedMask` of each annotation under each of its labels; empty where there is none."""
    parts = []
    for one in annotations:
        mask = encode_mask(one["segmentation"]["counts"])
        parts += [f"{label} {one['score']:g} {mask}" for label in labels[one["category_id"]]]
    return " ".join(parts)


def encode_mask(counts: str) -> str:
    """COCO's compressed counts as the Challenge's EncodedMask."""
    return base64.b64encode(zlib.compress(counts.encode("ascii"), zlib.Z_BEST_COMPRESSION)).decode("ascii")


class PredictionFiles:
    """Writes predictions.json, and submission.csv where labels are given, an image at a time, in constant memory.

    Both are there whole when the `with` block ends, or not at all where it fails.

    Args:
        out: the folder.
        categories: the network's classes.
        labels: of the submission; None for no submission.

    Attributes:
        images, objects: how many were added.
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
        """One image, as `image_record` made it; ids are given in the order of the calls, from 1."""
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

    def told(self) -> str:
        """What was added so far, such as `3 objects in 1 image`."""
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
    """The image with what was found drawn over it, as JPEG.

    Args:
        place: where to write.
        pixels: uint8 (3, H, W) RGB.
        found: in this image.
        categories: the network's classes.

    Raises:
        StorageError: it could not be written.
    """
    from PIL import Image

    from shards.drawing.overlay import draw_instances, legible_scale

    height, width = pixels.shape[-2:]
    picture = draw_instances(
        Image.fromarray(pixels.permute(1, 2, 0).contiguous().numpy()),
        found.instances(),
        categories,
        scores=found.scores.tolist(),
        scale=legible_scale(width, height),
    )
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=JPEG_QUALITY, subsampling=0)  # thin coloured lines stay sharp
    place.write(buffer.getvalue())


def _dump(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _publish(source: str, place: Location) -> None:
    """Put a file of any length to its place, whole or not at all."""
    with storage_errors(place.url):
        if not place.is_local:
            place.fs.put_file(source, place.path)
            return
        with open(source, "rb") as original, atomic_write(place.path) as file:
            shutil.copyfileobj(original, file)
