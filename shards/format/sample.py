"""What one ImageID holds, to and from the two members of a shard: `<ImageID>.jpg` and `<ImageID>.json`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from typing import Any

from shards.common.errors import SampleError
from shards.format.rle import Rle

# Dots split a member's name into key and extension; slashes would make folders. Neither may stand in a key.
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]{0,63}")

FLAGS = ("is_group_of", "is_occluded", "is_truncated", "is_depiction", "is_inside")


@dataclass(frozen=True, slots=True)
class Instance:
    """One annotated object.

    Attributes:
        category_id: the dataset's id of its class, from 1.
        bbox: x, y, w, h in pixels of the image as stored.
        segmentation: its mask at the image's size; None where there is a box and no mask.
        box_id: Open Images' BoxID (unique within one image); "" where the source gives none.
        label: the class that the source gave it, a MID: the class itself or one of its children.
        is_group_of: one box over several touching objects: a region, not an object. COCO's `iscrowd` says the same.
        is_occluded, is_truncated, is_depiction, is_inside: the source's other flags.
        predicted_iou: Open Images' estimate of the mask's quality, 0 to 1; None where unknown.
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

    def to_json(self) -> dict[str, Any]:
        """COCO's annotation, and Open Images' fields beside it."""
        value: dict[str, Any] = {
            "category_id": self.category_id,
            "bbox": list(self.bbox),
            "iscrowd": int(self.is_group_of),
            "segmentation": None if self.segmentation is None else self.segmentation.to_json(),
            "box_id": self.box_id,
            "label": self.label,
            "predicted_iou": self.predicted_iou,
        }
        for flag in FLAGS:
            value[flag] = getattr(self, flag)
        return value

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Instance:
        """The inverse of `to_json`; KeyError, TypeError or ValueError when `value` has another form."""
        x, y, w, h = (float(v) for v in value["bbox"])
        segmentation, predicted_iou = value["segmentation"], value["predicted_iou"]
        return cls(
            category_id=int(value["category_id"]),
            bbox=(x, y, w, h),
            segmentation=None if segmentation is None else Rle.from_json(segmentation),
            box_id=str(value["box_id"]),
            label=str(value["label"]),
            predicted_iou=None if predicted_iou is None else float(predicted_iou),
            **{flag: bool(value[flag]) for flag in FLAGS},
        )


@dataclass(frozen=True, slots=True)
class Sample:
    """One image with all that is known of it.

    Attributes:
        image_id: the key; letters, digits, `_` and `-`.
        image: the JPEG as the source has it, byte for byte.
        width, height: of the decoded JPEG, in pixels, EXIF orientation ignored.
        instances: every annotation of the dataset's classes.
        verified_present, verified_absent: category ids that annotators confirmed or ruled out in this image. A class in
            neither is unknown, not absent.
        rotation: degrees (0, 90, 180, 270) by which the picture must be turned counter-clockwise to stand upright.
            Pixels, boxes and masks agree as stored; nothing is turned.
        license, author, author_url, original_url, title: what attribution asks for; "" where the source is silent.
    """

    image_id: str
    image: bytes
    width: int
    height: int
    instances: tuple[Instance, ...] = ()
    verified_present: tuple[int, ...] = ()
    verified_absent: tuple[int, ...] = ()
    rotation: int = 0
    license: str = ""
    author: str = ""
    author_url: str = ""
    original_url: str = ""
    title: str = ""

    def to_members(self) -> dict[str, bytes]:
        """The sample as tar members by extension, in the order in which they lie in a shard.

        Raises:
            SampleError: the key cannot name tar members, or a mask has another size than the image.
        """
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
            "image_id": self.image_id,
            "width": self.width,
            "height": self.height,
            "rotation": self.rotation,
            "license": self.license,
            "author": self.author,
            "author_url": self.author_url,
            "original_url": self.original_url,
            "title": self.title,
            "verified_present": list(self.verified_present),
            "verified_absent": list(self.verified_absent),
            "annotations": [instance.to_json() for instance in self.instances],
        }
        return {"jpg": self.image, "json": canonical_json(value)}

    @classmethod
    def from_members(cls, image_id: str, members: Mapping[str, bytes | memoryview], *, where: str = "") -> Sample:
        """Read a sample back.

        Args:
            image_id: the key.
            members: bytes by extension; `jpg` and `json` are needed, others are left alone.
            where: what an error should name, such as the shard's URL.

        Raises:
            SampleError: a member is missing or does not hold what the format promises.
        """
        place = f"{where}: sample {image_id}" if where else f"sample {image_id}"
        for extension in ("jpg", "json"):
            if extension not in members:
                raise SampleError(f"{place}: there is no {image_id}.{extension}: is the shard truncated?")
        try:
            value = json.loads(bytes(members["json"]))
            return cls(
                image_id=image_id,
                image=bytes(members["jpg"]),
                width=int(value["width"]),
                height=int(value["height"]),
                instances=tuple(Instance.from_json(annotation) for annotation in value["annotations"]),
                verified_present=tuple(int(v) for v in value["verified_present"]),
                verified_absent=tuple(int(v) for v in value["verified_absent"]),
                rotation=int(value["rotation"]),
                **{name: str(value[name]) for name in ("license", "author", "author_url", "original_url", "title")},
            )
        except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
            # The repr of an error in UTF-8 begins with all of the bytes.
            reason = (str(error) if isinstance(error, UnicodeError) else repr(error))[:200]
            raise SampleError(f"{place}: {image_id}.json is not in the shard format ({reason})") from error


def canonical_json(value: Any) -> bytes:
    """UTF-8 JSON with sorted keys and no spaces: equal values give equal bytes. A dataclass is an object of its fields.

    NaN and infinities are a ValueError.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False, default=_fields_of
    )
    return text.encode("utf-8")


def _fields_of(value: Any) -> dict[str, Any]:
    if not is_dataclass(value):
        raise TypeError(f"{type(value).__name__} has no form in JSON")
    kind: Any = type(value)
    return {name: getattr(value, name) for name in _field_names(kind)}


@cache
def _field_names(kind: Any) -> tuple[str, ...]:
    return tuple(item.name for item in fields(kind))
