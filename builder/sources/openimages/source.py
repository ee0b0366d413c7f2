"""Open Images as a source: where it keeps things, and the columns of its tables.

Layout and columns are those of https://storage.googleapis.com/openimages/web/download_v7.html: images in a public S3
bucket, everything else (tables, mask zips, class names) below one annotation root, which may be any fsspec URL that
mirrors the public one.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from builder.fetching.fetch import Inventory
from builder.fetching.table_cache import Cache
from shards.storage.location import Location

# The rest of the package needs pyarrow; `builder.commands.cli` imports this module to print its help.
if TYPE_CHECKING:
    from builder.sources.base import Filters
    from builder.sources.openimages.annotations import OpenImagesSplit
    from builder.sources.taxonomy import Classes, Taxonomy

PUBLIC_IMAGES = "s3://open-images-dataset"
PUBLIC_ANNOTATIONS = "https://storage.googleapis.com/openimages"

# Our split names, and the source's.
SOURCE_SPLITS = {"train": "train", "val": "validation", "test": "test"}

# Column name -> Arrow type. Flags and confidences are written 0, 1, 1.0 or -1 (unknown) by different releases, so they
# are read as numbers and compared with 1.
BOX_COORDINATES = ("XMin", "XMax", "YMin", "YMax")
BOX_FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
BOX_COLUMNS = {
    "ImageID": "string",
    "LabelName": "string",
    **dict.fromkeys((*BOX_COORDINATES, *BOX_FLAGS), "float64"),
}
MASK_COORDINATES = ("BoxXMin", "BoxXMax", "BoxYMin", "BoxYMax")
MASK_COLUMNS = {
    **dict.fromkeys(("MaskPath", "ImageID", "LabelName", "BoxID"), "string"),
    **dict.fromkeys((*MASK_COORDINATES, "PredictedIoU"), "float64"),
}
LABEL_COLUMNS = {"ImageID": "string", "LabelName": "string", "Confidence": "float64"}
METADATA_COLUMNS = {
    **dict.fromkeys(("ImageID", "OriginalURL", "License", "AuthorProfileURL", "Author", "Title"), "string"),
    "Rotation": "float64",
}


def source_location(url: str, *, anonymous: bool = False) -> Location:
    """A place to read from; the public image bucket is read unsigned, any other S3 URL is signed unless told.

    A bucket of the public name at another endpoint (`AWS_ENDPOINT_URL`) is not the public bucket: it is signed like
    every other.
    """
    location = Location(url)
    if location.is_local:
        return Location(os.path.abspath(location.path))  # workers may have another current folder
    elsewhere = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    public = url == PUBLIC_IMAGES or url.startswith(f"{PUBLIC_IMAGES}/")
    return Location(url, anonymous=anonymous or (public and not elsewhere))


@dataclass(frozen=True)
class OpenImages:
    """A mirror of Open Images: an image root and an annotation root. Splits are named as the source names them.

    What is read of the tables and zip directories is kept in `cache`, if there is one.
    """

    images: Location
    annotations: Location
    cache: Cache | None = None

    @property
    def splits(self) -> Mapping[str, str]:
        """Our names of the splits -> the source's."""
        return SOURCE_SPLITS

    def origin(self) -> dict[str, str]:
        """What `dataset.json` records of the source."""
        return {"name": "Open Images", "images": self.images.url, "annotations": self.annotations.url}

    def taxonomy(self) -> Taxonomy:
        """The 601 boxable classes and their hierarchy; see `builder.sources.taxonomy.read_taxonomy` for errors."""
        from builder.sources.taxonomy import read_taxonomy

        return read_taxonomy(self)

    def open_split(self, split: str, classes: Classes, filters: Filters) -> OpenImagesSplit:
        """One split; its tables are read when they are asked for.

        Raises:
            StorageError: the annotations cannot be reached.
        """
        from builder.sources.openimages.annotations import OpenImagesSplit

        inventory = Inventory()
        inventory.ask([self.boxes(split), self.masks(split), self.labels(split), self.metadata(split)])
        return OpenImagesSplit(self, split, classes, filters, inventory)

    def image(self, split: str, image_id: str) -> Location:
        """The JPEG of one ImageID."""
        return self.images / split / f"{image_id}.jpg"

    def boxes(self, split: str) -> Location:
        """The box table: `BOX_COLUMNS` and more."""
        if split == "train":
            return self.annotations / "v6" / "oidv6-train-annotations-bbox.csv"
        return self.annotations / "v5" / f"{split}-annotations-bbox.csv"

    def masks(self, split: str) -> Location:
        """The mask table: `MASK_COLUMNS` and more."""
        return self.annotations / "v5" / f"{split}-annotations-object-segmentation.csv"

    def labels(self, split: str) -> Location:
        """The table of image labels that people verified: `LABEL_COLUMNS` and more."""
        return self.annotations / "v5" / f"{split}-annotations-human-imagelabels-boxable.csv"

    def metadata(self, split: str) -> Location:
        """The table of licences, authors, URLs and rotations: `METADATA_COLUMNS` and more."""
        name = "train-images-boxable-with-rotation.csv" if split == "train" else f"{split}-images-with-rotation.csv"
        return self.annotations / "2018_04" / split / name

    def mask_zip(self, split: str, image_id: str) -> Location:
        """The zip that holds the masks of an image: one of 16, by the ImageID's first hex digit."""
        return self.annotations / "v5" / f"{split}-masks" / f"{split}-masks-{image_id[0].lower()}.zip"

    @property
    def class_names(self) -> Location:
        """MIDs and names, without a header in v5, with one from v6 on."""
        return self.annotations / "v5" / "class-descriptions-boxable.csv"

    @property
    def hierarchy(self) -> Location:
        """The tree of the 600 boxable classes."""
        return self.annotations / "2018_04" / "bbox_labels_600_hierarchy.json"
