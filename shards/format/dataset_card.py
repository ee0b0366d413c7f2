"""The dataset card: `README.md` with the front matter that Hugging Face reads."""

import html
import re
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from shards.common.text import counted, printable
from shards.format.dataset import SPLITS, Category, Shard
from shards.format.index_schema import IndexRow
from shards.format.sample import ATTRIBUTION, FLAGS, Sample

README_FILE = "README.md"
PICTURE_FILE = "README.jpg"
# Names of splits, and those of Hugging Face's tools.
HUB_SPLITS = {"train": "train", "val": "validation", "test": "test"}
HUB_SIZES = ("n<1K", "1K<n<10K", "10K<n<100K", "100K<n<1M", "1M<n<10M")


def _fields(kind: str, *names: str, of: str = "dtype") -> list[dict[str, Any]]:
    return [{"name": name, of: kind} for name in names]


# By the version of the format: extensions of images, and further lists of class ids.
IMAGES: dict[int, tuple[str, ...]] = {1: ("jpg",), 2: ("jpg", "png"), 3: ("jpg", "png")}
NOT_EXHAUSTIVE: dict[int, tuple[str, ...]] = {1: (), 2: ("not_exhaustive",), 3: ("not_exhaustive",)}
_PREDICTION = (*_fields("string", "mask_source", "mask_run"), *_fields("float64", "mask_score"))


# The features to which `datasets` decodes a sample. Without them, it infers the columns from the first five samples and
# fails on the first field that is null or empty in all of them.
# Format: `Features._to_yaml_list` of https://github.com/huggingface/datasets
def features(version: int) -> list[dict[str, Any]]:
    """Return the features of a version of the format."""
    sample = [
        *_fields("string", "image_id"),
        *_fields("int32", "width", "height", "rotation"),
        *_fields("string", *ATTRIBUTION),
        *_fields("int32", "verified_present", "verified_absent", *NOT_EXHAUSTIVE[version], of="list"),
        {
            "name": "annotations",
            "list": [
                *_fields("int32", "category_id"),
                *_fields("float64", "bbox", of="list"),
                *_fields("int32", "iscrowd"),
                {
                    "name": "segmentation",
                    "struct": [{"name": "size", "list": "int32"}, *_fields("string", "counts")],
                },
                *_fields("string", "box_id", "label"),
                *_fields("float64", "predicted_iou", "area"),
                *(_PREDICTION if version >= 3 else ()),
                *_fields("bool", *FLAGS),
            ],
        },
    ]
    images = _fields("image", *IMAGES[version])
    return [*_fields("string", "__key__", "__url__"), *images, {"name": "json", "struct": sample}]


@dataclass(frozen=True)
class About:
    """What cards say about the source of a dataset."""

    title: str  # name of the data
    heading: str  # of the card, before the names of the classes
    origin: str  # how the shards were made, in Markdown
    licenses: tuple[str, ...]  # identifiers of Hugging Face's front matter; none if the licence depends on the image
    tag: str  # for Hugging Face's search
    attribution: str  # the section on licences, in Markdown


_YOURS = """\
Images and annotations are under the licences of their source, which its files do not state. Complete this section
before you distribute the data."""

# By the source's `name` in `dataset.json`.
ABOUT = {
    "Open Images": About(
        "Open Images",
        "Images and instance masks from Open Images",
        "cut out of\n[Open Images](https://storage.googleapis.com/openimages/web/index.html) by `build-shards`",
        ("cc-by-2.0", "cc-by-4.0"),
        "open-images",
        """\
Open Images lists the images as [CC BY 2.0](https://creativecommons.org/licenses/by/2.0/); each sample has its
`license`, `author`, `author_url` and `original_url`, which must accompany the image. There is no warranty for the
licence of a single image: check it at its URL. The annotations are by Google LLC under
[CC BY 4.0](https://creativecommons.org/licenses/by/4.0/). Resized masks and selected annotations are changes in the
sense of that licence.""",
    ),
    "COCO": About(
        "a dataset in COCO's format",
        "Images and instance masks from a dataset in COCO's format",
        "cut out of\n[a dataset in COCO's format](https://cocodataset.org/#format-data) by `build-shards`",
        (),
        "coco",
        """\
Images and annotations are under the licences of their source; each sample has the `license` and `original_url` of
its annotations, and in `title` the name of its file. Check them before you distribute the data.""",
    ),
    "LVIS": About(
        "LVIS",
        "Images and instance masks from LVIS",
        "cut out of\n[LVIS](https://www.lvisdataset.org) by `build-shards`",
        (),
        "lvis",
        """\
The images are COCO's; each sample has the `license` and `original_url` of its annotations. LVIS publishes its
annotations under [CC BY 4.0](https://creativecommons.org/licenses/by/4.0/), with the terms of use of COCO.""",
    ),
    "mask images": About(
        "a dataset with PNG masks",
        "Images and instance masks from a dataset with PNG masks",
        "cut out of a dataset with PNG masks by `build-shards`",
        (),
        "object-detection",
        _YOURS,
    ),
    "YOLO": About(
        "a dataset in Ultralytics' layout",
        "Images and instance masks from a dataset in Ultralytics' layout",
        "cut out of a dataset in Ultralytics' layout by `build-shards`",
        (),
        "object-detection",
        _YOURS,
    ),
    "DatasetWriter": About(
        "images and instance masks",
        "Images and instance masks",
        "packed with maskstream's\n`DatasetWriter`",
        (),
        "object-detection",
        """\
Each sample has the `license`, `author`, `author_url` and `original_url` with which it was added. Complete this section
before you distribute the data.""",
    ),
}

_IMAGE = {
    ("jpg",): "`<ImageID>.jpg` is the source's JPEG",
    ("jpg", "png"): "`<ImageID>.jpg` or `<ImageID>.png` is the source's image",
}
_PREDICTED = """\

A trained model predicted {predicted}, for objects of which the source has a box only. They are not counted as masks
above: their annotations have `mask_source` "predicted", `mask_score` (0 to 1) and `mask_run`, the name of the run.
"""
_CAST = 'dataset = dataset.cast_column("{0}", Image(decode=False))  # row["{0}"]["bytes"] is the {1}'
_TEXT = """\
# {heading}: {classes}

{samples} in {shards} ({megabytes:.1f} MB), {origin}.
{picture}
| split | class | images | masks | boxes | of these group-of |
| --- | --- | ---: | ---: | ---: | ---: |
{counts}

Every annotation of these classes in these images that the command does not exclude is included, with or without a mask.
Not packed: {failures};
`accounts.parquet` has a row for every image and every mask that was requested.
{predictions}
## Use

```python
from maskstream import EvalStream, loader, open_dataset

dataset = open_dataset("path/of/this/folder")  # or its URL: s3://..., gs://..., https://...
if __name__ == "__main__":  # loader processes may import this script
    for samples in loader(EvalStream(dataset, "{split}", batch_size=8), workers=2):  # a list of Sample
        print([sample.image_id for sample in samples])
```

`ShardStream` is the endless, shuffled stream for training; `maskstream train --data.shards path/of/this/folder` trains
a Mask R-CNN, `maskstream inspect` shows the samples.

## A sample

{image}, untouched; `<ImageID>.json` has its size, rotation, licence and author, the
classes that people verified as present or absent, and COCO-style `annotations`: `category_id` ({ids}),
`bbox` (x, y, w, h in pixels), `segmentation` (COCO compressed RLE at the image's size, or null), the original `label`,
and the source's flags. Pixels, boxes and masks agree as stored: ignore EXIF orientation.

```python
from datasets import Image, load_dataset

dataset = load_dataset("path/of/this/folder", split="{first_split}", streaming=True)
{casts}
```

(With its default decoding, `datasets` rotates a picture by its EXIF orientation, and boxes and masks no longer match.)

## Licence and attribution

{attribution}

## How it was made

{fence}
{command}
{fence}
"""


@dataclass(frozen=True)
class CardPicture:
    """A JPEG of a few samples, by rows."""

    jpeg: bytes
    samples: tuple[Sample, ...]


@dataclass(frozen=True)
class ClassCounts:
    """The contents of a split for one class."""

    split: str
    name: str
    images: int
    masks: int
    boxes: int
    groups: int
    predicted: int = 0  # masks, which are not among `masks`


def count_classes(rows: Sequence[IndexRow], categories: Sequence[Category]) -> list[ClassCounts]:
    """Count images, masks, boxes and group-of regions per split and class, in the order of `SPLITS` and of the ids."""
    totals: defaultdict[tuple[str, int], NDArray[np.int64]] = defaultdict(lambda: np.zeros(5, np.int64))
    for row in rows:
        predicted = row.predicted or (0,) * len(row.classes)
        for number, *counts in zip(row.classes, row.masks, row.instances, row.groups, predicted, strict=True):
            totals[row.split, number] += (1, *counts)
    found = {row.split for row in rows}
    return [
        ClassCounts(split, category.name, *totals[split, category.id].tolist())
        for split in SPLITS
        if split in found
        for category in categories
    ]


def escaped(name: str) -> str:
    """Return the name of a class as Markdown text on one line: without HTML, links, code and columns of a table."""
    return re.sub(r"([\\`*\[\]|])", r"\\\1", html.escape(printable(name), quote=False))


def _shown_picture(picture: CardPicture) -> str:
    """Return the Markdown of the picture, with the attribution of each sample."""
    credits = "; ".join(map(_credit, picture.samples))
    title = f"{counted(len(picture.samples), 'sample')} with masks and boxes"
    return f"\n![{title}]({PICTURE_FILE})\n\nBy rows: {credits}.\n"


def _shown_predictions(masks: int) -> str:
    return _PREDICTED.format(predicted=counted(masks, "mask")) if masks else ""


def _credit(sample: Sample) -> str:
    parts = [_linked(sample.title or sample.image_id, sample.original_url)]
    parts += [f"by {_linked(sample.author, sample.author_url)}"] if sample.author else []
    parts += [_linked("licence", sample.license)] if sample.license else []
    return ", ".join(parts)


def _linked(text: str, url: str) -> str:
    """Return text as a Markdown link, or as it is if the URL is not one for a web page."""
    is_safe = re.fullmatch(r"https?://[\w.~:/?#@!$&'*+,;=%-]+", url, re.ASCII)
    return f"[{escaped(text)}]({url})" if is_safe else escaped(text)


def render_card(
    categories: Sequence[Category],
    counts: Sequence[ClassCounts],
    shards: Sequence[Shard],
    command: str,
    failures: Mapping[str, int],
    source: str = "Open Images",
    picture: CardPicture | None = None,
) -> str:
    """Return the text of `README.md`: front matter, counts, format, licence, and the command that made it.

    Classes without a packed object are not listed. `failures` has the number of images and masks for each reason why
    they were not packed; `source` is a key of `ABOUT`; `picture` is next to the card.
    """
    about = ABOUT[source]
    packed = {c.name for c in counts if c.boxes}
    categories = [category for category in categories if category.name in packed]
    classes = ", ".join(category.name for category in categories)
    splits = [split for split in SPLITS if any(shard.split == split for shard in shards)]
    samples = sum(shard.samples for shard in shards)
    version = max(shard.version for shard in shards)
    files = [{"split": HUB_SPLITS[split], "path": f"{split}/*.tar"} for split in splits]
    front = {
        "pretty_name": f"{about.title}: {classes}",
        **({"license": list(about.licenses)} if about.licenses else {}),
        "task_categories": ["image-segmentation", "object-detection"],
        "tags": ["webdataset", about.tag, "instance-segmentation"],
        "size_categories": [HUB_SIZES[bisect_right([10**3, 10**4, 10**5, 10**6], samples)]],
        "configs": [{"config_name": "default", "data_files": files}],
        "dataset_info": {"config_name": "default", "features": features(version)},
    }
    rows = []
    for c in counts:
        if c.name in packed:
            rows.append(f"| {c.split} | {escaped(c.name)} | {c.images} | {c.masks} | {c.boxes} | {c.groups} |")
    text = _TEXT.format(
        heading=about.heading,
        origin=about.origin,
        attribution=about.attribution,
        image=_IMAGE[IMAGES[version]],
        casts="\n".join(_CAST.format(name, name.replace("jpg", "jpeg").upper()) for name in IMAGES[version]),
        classes=", ".join(escaped(category.name) for category in categories),
        samples=counted(samples, "image"),
        shards=counted(len(shards), "tar shard"),
        megabytes=sum(shard.nbytes for shard in shards) / 1e6,
        counts="\n".join(rows),
        predictions=_shown_predictions(sum(c.predicted for c in counts)),
        failures=", ".join(f"{count} {reason}" for reason, count in sorted(failures.items())) or "nothing",
        ids=", ".join(f"{category.id} {escaped(category.name)}" for category in categories),
        first_split=HUB_SPLITS[splits[0]],
        split=splits[0],
        picture="" if picture is None else _shown_picture(picture),
        command=command,
        fence="`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0)),
    )
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n\n{text}"
