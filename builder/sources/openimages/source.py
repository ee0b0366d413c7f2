"""Open Images as a source of images and annotations."""

from collections.abc import Mapping
from dataclasses import dataclass

from builder.fetching.fetch import Inventory, Request, fetch_one
from builder.fetching.table_cache import NO_CACHE, Cache
from builder.sources.base import Filters
from builder.sources.openimages.annotations import OpenImagesSplit
from builder.sources.openimages.class_tables import parse_children, parse_class_names
from builder.sources.openimages.layout import SOURCE_SPLITS, Layout
from builder.sources.taxonomy import Classes, Taxonomy
from shards.storage.location import Location


@dataclass(frozen=True)
class OpenImages(Layout):
    """Open Images or a mirror of it (a `builder.sources.base.Source`); `cache` keeps tables and zip directories."""

    cache: Cache = NO_CACHE

    @property
    def image_roots(self) -> tuple[Location, ...]:
        """The root of all splits."""
        return (self.images,)

    @property
    def image_layout(self) -> str:
        """Where the images are under their root, for messages."""
        return "<root>/train/<ImageID>.jpg, and so in validation/ and test/"

    @property
    def splits(self) -> Mapping[str, str]:
        """A dict from split names of a shard dataset to those of Open Images."""
        return SOURCE_SPLITS

    def origin(self) -> dict[str, str]:
        """Return what `dataset.json` records about the source."""
        return {"name": "Open Images", "images": self.images.url, "annotations": self.annotations.url}

    def taxonomy(self) -> Taxonomy:
        """Read the 600 boxable classes and their hierarchy."""
        names, hierarchy = (fetch_one(Request(location)) for location in (self.class_names, self.hierarchy))
        return Taxonomy(parse_class_names(names, str(self.class_names)), parse_children(hierarchy, str(self.hierarchy)))

    def open_split(self, split: str, classes: Classes, filters: Filters) -> OpenImagesSplit:
        """Open a split by its name in Open Images; its tables are read when they are needed."""
        inventory = Inventory()
        inventory.load([self.boxes(split), self.masks(split), self.labels(split), self.metadata(split)])
        return OpenImagesSplit(self, split, classes, filters, self.cache, inventory)
