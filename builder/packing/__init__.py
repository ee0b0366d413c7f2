"""From a planned image to a sample in a shard. Tasks run here, in local processes or on Dask, with the same result."""
