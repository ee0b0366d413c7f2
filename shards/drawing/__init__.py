"""Annotated images: masks, boxes and names drawn on a photograph, and outlines of masks as SVG paths."""
