"""Reads samples from storage and makes batches of them, in loader processes.

Range reads are planned from the order; an optional cache keeps samples on a local disk.
"""
