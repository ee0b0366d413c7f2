"""COCO and LVIS as sources: images under a root, annotations and masks in instances files.

COCO's annotators searched every image for every category, so a category without an object in an image is verified
absent there; LVIS's files state which categories were looked for. The file name is the sample's title.
"""

from dataclasses import dataclass

from builder.fetching.fetch import Request, fetch_one
from builder.sources.coco_instances import parse_instances
from builder.sources.listing import ListedSource, Listing
from shards.storage.location import Location


@dataclass(frozen=True)
class Coco(ListedSource):
    """COCO's instances files (https://cocodataset.org/#format-data)."""

    @property
    def name(self) -> str:
        """The name of the source in `dataset.json`."""
        return "COCO"

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""
        return "<root>/<file_name>, with each file_name as in --annotations"

    def _read(self, split: str, location: Location, prefix: str) -> Listing:
        return parse_instances(fetch_one(Request(location)), str(location), prefix)


@dataclass(frozen=True)
class Lvis(ListedSource):
    """LVIS (https://www.lvisdataset.org/dataset): COCO's images, in which only some categories were looked for."""

    @property
    def name(self) -> str:
        """The name of the source in `dataset.json`."""
        return "LVIS"

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""
        return "<root>/train2017/<file> and <root>/val2017/<file>, as in the coco_url of each image"

    def _read(self, split: str, location: Location, prefix: str) -> Listing:
        return parse_instances(fetch_one(Request(location)), str(location), prefix, lvis=True)
