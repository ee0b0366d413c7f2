"""Errors, text and tables, argument checks, back-off, and random numbers by hashing, for every folder.

It imports nothing else of the project.
"""
