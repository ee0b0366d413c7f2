"""Errors, text and tables, argument checks, back-off, and random numbers by hashing, for every folder."""
