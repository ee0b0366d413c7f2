"""Build shards from Open Images or COCO. A plan chooses images and masks; packing fetches and accounts for them."""
