"""From a planned image to a sample in a shard: fetch, check, encode, write.

Runs in this process, in local processes or on a Dask cluster.
"""
