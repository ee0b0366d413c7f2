"""The shard format of maskstream: what a sample, a shard, a dataset and an order are; writing and streaming them.

`shards` imports neither of its tenants, `builder` and `trainer`.
"""
