"""Mask R-CNN on a few classes of Open Images, streamed from tar shards."""
