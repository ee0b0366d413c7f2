"""COCO: `annotations/instances_<split>.json`, and images in a folder per split.

Format: https://cocodataset.org/#format-data. Masks are compressed RLE, also those of objects that are no crowd, so that
no pixel changes. A box without a mask has an empty `segmentation`. Verified labels are LVIS's `neg_category_ids` and
`not_exhaustive_category_ids` (https://www.lvisdataset.org/dataset); other fields of this package are additional ones.
"""

from __future__ import annotations

import shlex
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any, BinaryIO

from shards.common.redact import redact_url
from shards.export.export import Export, Tally, samples, write
from shards.format.dataset import Category, Dataset
from shards.format.sample import Sample, canonical_json
from shards.storage.local_files import atomic_write

BOX_ONLY = "objects without a mask, whose segmentation is empty"


def write_split(export: Export, tally: Tally) -> None:
    """Write the images of a split, then its instances file, in memory for a few images."""
    split, licenses = tally.split, dict[str, int]()
    place = export.out / "annotations" / f"instances_{split}.json"
    place.parent.mkdir(exist_ok=True)
    with tempfile.TemporaryFile(dir=place.parent) as images, atomic_write(str(place)) as file:
        file.write(b'{"annotations":[')
        for number, sample in samples(export, tally):
            write(export.out / split / sample.file_name, sample.image)
            entry = image_entry(sample, number)
            if sample.license:
                entry["license"] = licenses.setdefault(sample.license, len(licenses) + 1)
            _append(images, tally.images > 1, entry)
            for entry in annotation_entries(sample, number, tally):
                _append(file, entry["id"] > 1, entry)
                tally.remarks[BOX_ONLY] += not entry["segmentation"]
        file.write(b'],"images":[')
        images.seek(0)
        shutil.copyfileobj(images, file)
        terms = [{"id": number, "name": text, "url": text} for text, number in licenses.items()]
        rest = {"categories": categories(export.dataset), "info": _info(export.dataset, split), "licenses": terms}
        file.write(b"]," + canonical_json(rest)[1:])


def next_step(export: Export, tallies: Sequence[Tally]) -> str:
    """Return the command that builds shards from the files again."""
    splits = [tally.split for tally in tallies]
    roots = [f"{split}={export.out / split}" for split in splits]
    files = [f"{split}={export.out / 'annotations' / f'instances_{split}.json'}" for split in splits]
    words = ["build-shards", "--source", "coco", "--images", *roots, "--annotations", *files, "--out", "shards"]
    return shlex.join([*words, *(["--keep-empty"] if any(tally.empty for tally in tallies) else [])])


def categories(dataset: Dataset) -> list[dict[str, Any]]:
    """Return COCO's categories, with the dataset's ids; each is its own supercategory, as COCO has it for a root."""
    return [_category(category) for category in dataset.categories]


def image_entry(sample: Sample, number: int) -> dict[str, Any]:
    """Return COCO's entry of an image, without `license`."""
    return {
        **{name: getattr(sample, name) for name in ("width", "height", "rotation", "author", "author_url", "title")},
        "id": number,
        "file_name": sample.file_name,
        "flickr_url": sample.original_url,
        "verified_present": list(sample.verified_present),
        "neg_category_ids": list(sample.verified_absent),
        "not_exhaustive_category_ids": list(sample.not_exhaustive),
    }


def annotation_entries(sample: Sample, number: int, tally: Tally) -> list[dict[str, Any]]:
    """Return COCO's annotations of an image, with ids from `tally.objects` on, and count them."""
    found = []
    for instance in sample.instances:
        tally.objects += 1
        entry = {"id": tally.objects, "image_id": number, "area": instance.coco_area()}
        found.append({**instance.to_json(), **entry, **({} if instance.segmentation else {"segmentation": []})})
    tally.empty += not found
    return found


def _category(category: Category) -> dict[str, Any]:
    return {"id": category.id, "name": category.name, "supercategory": category.name, "mid": category.mid}


def _info(dataset: Dataset, split: str) -> dict[str, Any]:
    return {"description": f"split {split} of {redact_url(str(dataset.root))}, {dataset.selection}"}


def _append(file: BinaryIO | Any, comma: bool, entry: Mapping[str, Any]) -> None:
    file.write((b"," if comma else b"") + canonical_json(entry))
