"""Build shards from Open Images, COCO and others. A plan chooses images and masks; packing fetches and records them."""
