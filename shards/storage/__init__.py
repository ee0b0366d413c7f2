"""Reading and writing objects and files.

A `Location` is any fsspec URL; errors of any store become one-line messages with a remedy.
"""
