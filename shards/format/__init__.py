"""The format of samples, shards and datasets, on disk and in memory.

`dataset.json`, `index.parquet`, `accounts.parquet`, the card and the tars are read, written and checked here.
"""
