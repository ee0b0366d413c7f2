"""Where images and annotations come from: Open Images and COCO files.

A source is one class that implements `base.Source`.
"""
