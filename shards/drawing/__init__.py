"""Annotated images: masks, boxes and names drawn on a photograph, with Pillow and numpy alone.

The trainer draws detections with it, and the page of `inspect-shards` shows outlines of masks as SVG paths.
"""
