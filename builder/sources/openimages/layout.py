"""Where Open Images keeps its files: addresses, names of splits, and the columns of its tables.

The layout is that of https://storage.googleapis.com/openimages/web/download_v7.html: the images are in a public S3
bucket, everything else (tables, mask zips, class names) is under one annotation root.

Only light modules are imported here, because the command line needs these addresses to print its help.
"""

import os
from dataclasses import dataclass

from shards.storage.location import Location

PUBLIC_IMAGES = "s3://open-images-dataset"
PUBLIC_ANNOTATIONS = "https://storage.googleapis.com/openimages"

# Split names of a shard dataset -> those of Open Images.
SOURCE_SPLITS = {"train": "train", "val": "validation", "test": "test"}

# Column name -> Arrow type. Flags and confidences are written 0, 1, 1.0 or -1 (unknown) by different releases, so they
# are read as numbers and compared with 1.
BOX_COORDINATES = ("XMin", "XMax", "YMin", "YMax")
BOX_FLAGS = ("IsOccluded", "IsTruncated", "IsGroupOf", "IsDepiction", "IsInside")
BOX_COLUMNS = {
    **dict.fromkeys(("ImageID", "LabelName"), "string"),
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
    """Return the location of a source; S3 requests to the public image bucket are never signed.

    A bucket with the public name at another endpoint (`AWS_ENDPOINT_URL`) is not the public bucket. `anonymous`: do not
    sign requests to other buckets either.
    """
    location = Location(url)
    if location.is_local:
        return Location(os.path.abspath(location.path))  # workers may have another working directory
    other_endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
    public = url == PUBLIC_IMAGES or url.startswith(f"{PUBLIC_IMAGES}/")
    return Location(url, anonymous=anonymous or (public and not other_endpoint))


@dataclass(frozen=True)
class Layout:
    """The files of Open Images or of a mirror of it, with the names that Open Images gives the splits."""

    images: Location
    annotations: Location

    def image(self, split: str, image_id: str) -> Location:
        """The JPEG of an image."""
        return self.images / split / f"{image_id}.jpg"

    def boxes(self, split: str) -> Location:
        """The table of boxes, with at least `BOX_COLUMNS`."""
        if split == "train":
            return self.annotations / "v6" / "oidv6-train-annotations-bbox.csv"
        return self.annotations / "v5" / f"{split}-annotations-bbox.csv"

    def masks(self, split: str) -> Location:
        """The table of masks, with at least `MASK_COLUMNS`."""
        return self.annotations / "v5" / f"{split}-annotations-object-segmentation.csv"

    def labels(self, split: str) -> Location:
        """The table of verified image labels, with at least `LABEL_COLUMNS`."""
        return self.annotations / "v5" / f"{split}-annotations-human-imagelabels-boxable.csv"

    def metadata(self, split: str) -> Location:
        """The table of licences, authors, URLs and rotations, with at least `METADATA_COLUMNS`."""
        name = "train-images-boxable-with-rotation.csv" if split == "train" else f"{split}-images-with-rotation.csv"
        return self.annotations / "2018_04" / split / name

    def mask_zip(self, split: str, image_id: str) -> Location:
        """The zip with the masks of an image: one of 16, by the first hexadecimal digit of the ImageID."""
        return self.annotations / "v5" / f"{split}-masks" / f"{split}-masks-{image_id[0].lower()}.zip"

    @property
    def class_names(self) -> Location:
        """The table of MIDs and class names, without a header in v5 and with one since v6."""
        return self.annotations / "v5" / "class-descriptions-boxable.csv"

    @property
    def hierarchy(self) -> Location:
        """The JSON tree of the 600 boxable classes under their root entity."""
        return self.annotations / "2018_04" / "bbox_labels_600_hierarchy.json"
