"""Reading and writing objects and files.

Every place is an fsspec URL, a `Location`; errors of any store become one-line messages with a remedy.
"""
