"""Errors, text and tables, argument checks, back-off, and random numbers by hashing, for every folder.

Each module is small and imports nothing of the project but its neighbours here.
"""
