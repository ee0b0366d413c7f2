"""Concurrent reads of objects and of members of zips, with retries. Tables are cached; requests are counted."""
