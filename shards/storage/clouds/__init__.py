"""The stores of clouds: for each, fsspec's file system with this package's limits, and its settings for obstore.

What the file system has found (addresses, accounts, credentials) is taken over, so that the usual variables and files
have one meaning; `None` for settings means that only the file system can read there.
"""
