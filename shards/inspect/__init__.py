"""The command `inspect-shards`: counts, verifies and shows a finished dataset, or extracts samples from it.

Counts come from the index; only --verify reads every byte, and a gallery or extraction only the samples that it needs.
"""
