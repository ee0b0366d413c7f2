"""Annotated images: masks, boxes and names drawn on a photograph, and outlines of masks as SVG paths.

Only Pillow and numpy are needed, and no display.
"""
