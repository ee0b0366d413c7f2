"""The command `inspect-shards`: statistics, verification, a page with a gallery, extraction of one sample.

It reads finished datasets and changes nothing.
"""
