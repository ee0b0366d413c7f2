"""From a planned image to a sample in a shard: fetch, check, encode and write.

Tasks run in this process, in local processes or on a Dask cluster, with the same result.
"""
