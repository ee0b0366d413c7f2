"""Concurrent reads with retries: whole objects, members of remote zips, and the cache of annotation tables.

Requests and bytes are counted.
"""
