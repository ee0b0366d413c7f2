"""The places that images and annotations come from: Open Images and COCO files.

A source is a class that implements `base.Source`.
"""
