"""Many reads at once, with retries: whole files, members of remote zips, cached tables.

Requests and bytes are counted.
"""
