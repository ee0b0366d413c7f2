"""Annotated images: masks, boxes and names on a photograph, and outlines of masks. Pillow and numpy only."""
