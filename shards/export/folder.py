"""Plain folders, as those of the Data Science Bowl and PennFudan: an image, and a PNG for each of its masks.

`<split>/images/<ImageID>.jpg` or `.png`, `<split>/masks/<ImageID>/<number>_<class>.png` (0 and 255, at the image's
size), and `<split>/objects.csv` with a line per object.
"""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Sequence

from PIL import Image

from shards.export.export import Export, Tally, samples, write
from shards.format import rle
from shards.format.sample import FLAGS
from shards.storage.local_files import atomic_write

COLUMNS = ("image", "object", "class", "x", "y", "width", "height", "mask", *FLAGS)
NO_FILE = "objects without a mask: only in objects.csv"


def write_split(export: Export, tally: Tally) -> None:
    """Write the images and masks of a split, and `objects.csv`."""
    root = export.out / tally.split
    names = {category.id: category.name for category in export.dataset.categories}
    with atomic_write(str(root / "objects.csv")) as file:
        text = io.TextIOWrapper(file, "utf-8", newline="")
        table = csv.writer(text, lineterminator="\n")
        table.writerow(COLUMNS)
        for _, sample in samples(export, tally):
            write(root / "images" / sample.file_name, sample.image)
            for number, instance in enumerate(sample.instances):
                name, mask = names[instance.category_id], ""
                if instance.segmentation is not None:
                    mask = f"masks/{sample.image_id}/{number}_{_safe(name)}.png"
                    write(root / mask, _png(instance.segmentation))
                flags = (int(getattr(instance, flag)) for flag in FLAGS)
                table.writerow((sample.image_id, number, name, *instance.bbox, mask, *flags))
                tally.remarks[NO_FILE] += not mask
            tally.objects += len(sample.instances)
            tally.empty += not sample.instances
        text.flush()


def next_step(export: Export, tallies: Sequence[Tally]) -> str:
    """Return where the objects are listed."""
    return f"read {export.out / tallies[0].split / 'objects.csv'}"


def _png(mask: rle.Rle) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(rle.decode(mask) * 255).save(buffer, "PNG")
    return buffer.getvalue()


def _safe(name: str) -> str:
    """Return a class's name with `_` for what not every file system takes."""
    return re.sub(r"[^A-Za-z0-9-]+", "_", name).strip("_")[:64] or "class"
