"""A sample, and its two members in a shard: `<ImageID>.jpg` or `<ImageID>.png`, and `<ImageID>.json`."""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, is_dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from shards.common.errors import SampleError
from shards.common.text import counted
from shards.format.rle import Rle, all_valid, decode
from shards.format.rle import area as mask_area
from shards.format.rle import fault as mask_fault

if TYPE_CHECKING:
    from PIL import Image

# No dots, which split a member's name into key and extension, and no slashes, which would make folders.
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

FLAGS = ("is_group_of", "is_occluded", "is_truncated", "is_depiction", "is_inside")
PREDICTED = "predicted"  # the `mask_source` of a predicted mask; other masks have none
OMIT_NONE = {"omit_none": True}  # metadata of a field that `canonical_json` leaves out while it is None
LARGEST_SIDE = 65_535  # pixels; JPEG has no larger images
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
EXTENSIONS = ("jpg", "png")  # of images
SLACK = 0.01  # pixels by which a box may extend beyond the image: coordinates are rounded to 1/1000
ATTRIBUTION = ("license", "author", "author_url", "original_url", "title")


@dataclass(frozen=True, slots=True)
class Category:
    """A class of the dataset: an id from 1, its name, and its MID at the source."""

    id: int
    name: str
    mid: str


@dataclass(frozen=True, slots=True)
class MaskPrediction:
    """Where a predicted mask comes from: its score, 0 to 1, and the name of the run that predicted it."""

    score: float
    run: str


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object.

    Attributes:
        category_id: the dataset's id of its class, from 1.
        bbox: x, y, w, h in pixels of the image as stored.
        segmentation: its mask at the image's size; None for a box without a mask.
        box_id: Open Images' BoxID (unique within one image); "" if the source has none.
        label: the MID of its class at the source: the class itself or one of its children.
        is_group_of: one box over several touching objects: a region, not an object. The same as COCO's `iscrowd`.
        is_occluded, is_truncated, is_depiction, is_inside: the source's other flags.
        predicted_iou: Open Images' estimate of the mask's quality, 0 to 1; None if unknown.
        area: the object's area in pixels by the source, which COCO's metric takes for small, medium and large; None if
            the source gives none.
        prediction: of a predicted mask; None for a mask of the source.
    """

    category_id: int
    bbox: tuple[float, float, float, float]
    segmentation: Rle | None
    box_id: str = ""
    label: str = ""
    is_group_of: bool = False
    is_occluded: bool = False
    is_truncated: bool = False
    is_depiction: bool = False
    is_inside: bool = False
    predicted_iou: float | None = None
    area: float | None = None
    prediction: MaskPrediction | None = None

    @property
    def source_mask(self) -> Rle | None:
        """Its mask if that is the source's; None for a box without a mask and for a predicted mask."""
        return self.segmentation if self.prediction is None else None

    def coco_area(self) -> float:
        """Return COCO's `area` of the object in pixels: the source's, else that of its mask, else that of its box.

        A predicted mask does not count, so that an evaluation by size is the same with and without it.
        """
        if self.area is not None:
            return self.area
        mask = 0 if self.source_mask is None else mask_area(self.source_mask)
        return float(mask) or self.bbox[2] * self.bbox[3]

    def to_json(self) -> dict[str, Any]:
        """Return COCO's annotation with the additional fields of Open Images."""
        return {
            **{name: getattr(self, name) for name in ("category_id", "box_id", "label", "predicted_iou", *FLAGS)},
            "bbox": list(self.bbox),
            "iscrowd": int(self.is_group_of),
            "segmentation": None if self.segmentation is None else self.segmentation.to_json(),
            **({} if self.area is None else {"area": self.area}),
            **({} if self.prediction is None else _prediction_json(self.prediction)),
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Instance:
        """Parse what `to_json` returns; KeyError, TypeError or ValueError if `value` has another form."""
        x, y, w, h = (float(v) for v in value["bbox"])
        segmentation, predicted_iou, area = value["segmentation"], value["predicted_iou"], value.get("area")
        return cls(
            category_id=int(value["category_id"]),
            bbox=(x, y, w, h),
            segmentation=None if segmentation is None else Rle.from_json(segmentation),
            box_id=str(value["box_id"]),
            label=str(value["label"]),
            predicted_iou=None if predicted_iou is None else float(predicted_iou),
            area=None if area is None else float(area),
            prediction=_prediction_from_json(value),
            **{flag: bool(value[flag]) for flag in FLAGS},
        )


def _prediction_json(prediction: MaskPrediction) -> dict[str, Any]:
    return {"mask_source": PREDICTED, "mask_score": prediction.score, "mask_run": prediction.run}


def _prediction_from_json(annotation: dict[str, Any]) -> MaskPrediction | None:
    if "mask_source" not in annotation:
        return None
    if (source := annotation["mask_source"]) != PREDICTED:
        raise ValueError(f"mask_source is {source!r}, not {PREDICTED!r}")
    if not isinstance(run := annotation["mask_run"], str):
        raise ValueError(f"mask_run is {run!r}, not a text")
    return MaskPrediction(float(annotation["mask_score"]), run)


@dataclass(frozen=True, slots=True, repr=False)
class Sample:
    """One image with its annotations and attribution.

    Attributes:
        image_id: the key: letters, digits, `_` and `-`.
        image: the source's JPEG or PNG, byte for byte.
        width, height: size of the decoded image in pixels, EXIF orientation ignored.
        instances: every annotation of the dataset's classes.
        verified_present, verified_absent: category ids that annotators confirmed or ruled out in this image. A class in
            neither is unknown, not absent.
        not_exhaustive: category ids of which some objects in this image may have no annotation, as in LVIS.
        rotation: degrees (0, 90, 180, 270) by which to rotate the picture counter-clockwise to make it upright.
            Pixels, boxes and masks agree as stored; nothing is rotated.
        license, author, author_url, original_url, title: attribution; "" where unknown.
    """

    image_id: str
    image: bytes
    width: int
    height: int
    instances: tuple[Instance, ...] = ()
    verified_present: tuple[int, ...] = ()
    verified_absent: tuple[int, ...] = ()
    not_exhaustive: tuple[int, ...] = ()
    rotation: int = 0
    license: str = ""
    author: str = ""
    author_url: str = ""
    original_url: str = ""
    title: str = ""

    def __repr__(self) -> str:
        masks = sum(instance.source_mask is not None for instance in self.instances)
        predicted = sum(instance.prediction is not None for instance in self.instances)
        objects = f"{counted(len(self.instances), 'object')}, {counted(masks, 'mask')}"
        objects += f", {counted(predicted, 'predicted mask')}" if predicted else ""
        return f"Sample({self.image_id!r}, {self.width}x{self.height}, {objects})"

    @property
    def file_name(self) -> str:
        """The name of its image in the shard: the key with `.jpg` or `.png`."""
        return f"{self.image_id}.{extension_of(self.image)}"

    @property
    def version(self) -> int:
        """The version of the format that can hold the sample.

        Version 1 has neither PNGs nor `not_exhaustive`, versions 1 and 2 have no predicted masks.
        """
        if any(instance.prediction is not None for instance in self.instances):
            return 3
        return 2 if self.image.startswith(PNG_SIGNATURE) or self.not_exhaustive else 1

    def picture(self) -> Image.Image:
        """Decode the image to an RGB picture of PIL, as stored: EXIF orientation and `rotation` are not applied.

        A SampleError is raised if the image is damaged, or larger than Pillow's limit.
        """
        from PIL import Image

        from shards.format.image import STORED, ImageError, pillow_errors, rgb

        try:
            with pillow_errors(), Image.open(io.BytesIO(self.image), formats=STORED) as image:
                return Image.fromarray(rgb(image))
        except ImageError as error:
            name = f"sample {self.image_id}: {self.file_name}"
            raise SampleError(f"{name} cannot be decoded: {error}: build the dataset again") from error

    def masks(self) -> NDArray[np.bool_]:
        """Return bool [N, H, W], a mask for each of the N instances; without a `segmentation`, False everywhere."""
        masks = np.zeros((len(self.instances), self.height, self.width), np.bool_)
        for mask, instance in zip(masks, self.instances, strict=True):
            if instance.segmentation is not None:
                mask[:] = decode(instance.segmentation)
        return masks

    def without_predictions(self) -> Sample:
        """Return the sample as the source has it: an object with a predicted mask is one with a box only."""
        if all(instance.prediction is None for instance in self.instances):
            return self
        instances = tuple(replace(one, segmentation=one.source_mask, prediction=None) for one in self.instances)
        return replace(self, instances=instances)

    def to_members(self) -> dict[str, bytes]:
        """Return the tar members by extension, in order; a SampleError if the key or the size of a mask is wrong."""
        if not KEY.fullmatch(self.image_id):
            raise SampleError(f"image id {self.image_id!r}: only 1 to 64 letters, digits, '_' and '-' can key a sample")
        for instance in self.instances:
            rle = instance.segmentation
            if rle is not None and (rle.height, rle.width) != (self.height, self.width):
                raise SampleError(
                    f"image {self.image_id}, box {instance.box_id}: the mask is {rle.width}x{rle.height}, "
                    f"the image {self.width}x{self.height}: resize the mask to the image first"
                )
        value = {
            **{name: getattr(self, name) for name in ("image_id", "width", "height", "rotation", *ATTRIBUTION)},
            "verified_present": list(self.verified_present),
            "verified_absent": list(self.verified_absent),
            **({"not_exhaustive": list(self.not_exhaustive)} if self.not_exhaustive else {}),
            "annotations": [instance.to_json() for instance in self.instances],
        }
        return {extension_of(self.image): self.image, "json": canonical_json(value)}

    @classmethod
    def from_members(
        cls, image_id: str, members: Mapping[str, bytes | memoryview], *, where: str = "", check: bool = True
    ) -> Sample:
        """Parse `jpg` or `png`, and `json`; a SampleError, after `where` (the shard's URL), if they are not right.

        With `check`, so is one whose size, boxes or masks must not reach native code (`unsafe`).
        """
        name = f"{where}: sample {image_id}" if where else f"sample {image_id}"
        extension = next((found for found in EXTENSIONS if found in members), "jpg")
        for wanted in (extension, "json"):
            if wanted not in members:
                raise SampleError(f"{name}: there is no {image_id}.{wanted}: is the shard truncated?")
        image = bytes(members[extension])
        if extension_of(image) != extension:
            raise SampleError(f"{name}: {image_id}.{extension} is another kind of file: build the dataset again")
        try:
            value = json.loads(bytes(members["json"]))
            sample = cls(
                image_id=image_id,
                image=image,
                width=int(value["width"]),
                height=int(value["height"]),
                instances=tuple(Instance.from_json(annotation) for annotation in value["annotations"]),
                verified_present=tuple(int(v) for v in value["verified_present"]),
                verified_absent=tuple(int(v) for v in value["verified_absent"]),
                not_exhaustive=tuple(int(v) for v in value.get("not_exhaustive", ())),
                rotation=int(value["rotation"]),
                **{field: str(value[field]) for field in ATTRIBUTION},
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            # The repr of a UnicodeError begins with all of the bytes.
            reason = (str(error) if isinstance(error, UnicodeError) else repr(error))[:200]
            raise SampleError(f"{name}: {image_id}.json is not in the shard format ({reason})") from error
        if check and (problem := unsafe(sample)):
            raise SampleError(f"{name}: {problem}: build the dataset again")
        return sample


def extension_of(image: bytes) -> str:
    """Return the extension under which a shard stores an image: `png` for a PNG, otherwise `jpg`."""
    return "png" if image.startswith(PNG_SIGNATURE) else "jpg"


def unsafe(sample: Sample) -> str:
    """Return why the code that draws, trains and evaluates must not get a sample, "" if it may.

    That code is partly native and checks nothing: a mask whose runs exceed its image writes beyond an array, and a box
    far outside of it is rasterised there.
    """
    width, height = sample.width, sample.height
    if not (1 <= width <= LARGEST_SIDE and 1 <= height <= LARGEST_SIDE):
        return f"{sample.image_id}.json says {width}x{height}, not the size of an image"
    masks = [instance.segmentation for instance in sample.instances if instance.segmentation is not None]
    valid = all_valid(masks, width, height)
    for number, instance in enumerate(sample.instances):
        mask = None if valid else instance.segmentation
        problem = box_fault(instance.bbox, width, height) or ("" if mask is None else mask_fault(mask, width, height))
        if problem:
            return f"annotation {number}{f' (box {instance.box_id})' if instance.box_id else ''}: {problem}"
    return ""


def box_fault(bbox: tuple[float, float, float, float], width: int, height: int) -> str:
    """Return what is wrong with the place of a box x, y, w, h in an image of that size in pixels; "" if nothing is."""
    x, y, w, h = bbox
    # NaN fails every comparison.
    if w >= 0 and h >= 0 and x >= -SLACK and y >= -SLACK and x + w <= width + SLACK and y + h <= height + SLACK:
        return ""
    shown = f"bbox {shown_box(bbox)}"
    if not all(map(math.isfinite, bbox)):
        return f"{shown} is not finite"
    return f"{shown} is empty" if w < 0 or h < 0 else f"{shown} leaves the image of {width}x{height}"


def shown_box(box: tuple[float, float, float, float]) -> str:
    """Return a box for a message: `[1, 2, 3.5, 4]`."""
    return f"[{', '.join(f'{value:g}' for value in box)}]"


def canonical_json(value: Any) -> bytes:
    """Return UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes.

    A dataclass becomes an object of its fields (see OMIT_NONE), a number of numpy a plain one; NaN and infinities are a
    ValueError.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_fields_of
    )
    return text.encode("utf-8")


def _fields_of(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    return {
        name: found
        for name, item in value.__dataclass_fields__.items()
        if (found := getattr(value, name)) is not None or item.metadata != OMIT_NONE
    }
