"""What a sample, a shard and a dataset are, on disk and in memory.

`dataset.json`, `index.parquet` and the tars are read and written here.
"""
