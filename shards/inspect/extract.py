"""Extraction of one sample into files: the image, the JSON, and each mask as a PNG."""

import io
import re
from collections.abc import Sequence

import numpy as np
from PIL import Image

from shards.format import rle
from shards.format.dataset import Category, Dataset
from shards.format.sample import Sample
from shards.inspect.preview_samples import find, read_samples
from shards.storage.location import Location

# Labels and ids of the data that may become part of a file name; other masks are numbered.
MID = re.compile(r"/[a-z]{1,3}/[A-Za-z0-9_]{1,32}")
BOX_ID = re.compile(r"[A-Za-z0-9_-]{1,64}")


def extract(dataset: Dataset, image_id: str, out: Location) -> list[Location]:
    """Write a sample's files to the folder `out`, replacing files of the same names, and return their locations.

    Masks are 1-bit PNGs of the image's size, white where the object is. Raises DatasetError if there is no such sample,
    SampleError if it cannot be read or is damaged, and StorageError if a file cannot be written.
    """
    [(_, sample)] = read_samples(dataset, [find(dataset, image_id)])
    files = {f"{sample.image_id}.{extension}": data for extension, data in sample.to_members().items()}
    for name, instance in zip(mask_names(sample, dataset.categories), sample.instances):
        if instance.segmentation is not None:
            buffer = io.BytesIO()
            Image.fromarray(rle.decode(instance.segmentation).astype(np.bool_)).save(buffer, "PNG")
            files[name] = buffer.getvalue()
    for name, data in files.items():
        (out / name).write(data)
    return [out / name for name in files]


def mask_names(sample: Sample, categories: Sequence[Category]) -> list[str]:
    """Return a file name per annotation: Open Images' MaskPath, `<ImageID>_<MID without slashes>_<BoxID>.png`.

    Without a MID or BoxID (COCO), or if two names are the same: `<ImageID>_<number of the annotation>.png`. The name of
    a predicted mask ends with `_predicted.png`.
    """
    mids = {category.id: category.mid for category in categories}
    names = []
    for instance in sample.instances:
        mid = instance.label or mids.get(instance.category_id, "")
        named = MID.fullmatch(mid) and BOX_ID.fullmatch(instance.box_id)
        names.append(f"{mid.replace('/', '')}_{instance.box_id}" if named else "")
    whole = [str(number) if not name or names.count(name) > 1 else name for number, name in enumerate(names)]
    ends = ["" if instance.prediction is None else "_predicted" for instance in sample.instances]
    return [f"{sample.image_id}_{name}{end}.png" for name, end in zip(whole, ends, strict=True)]
