"""The records that pass between the steps of a build: candidates and plans.

They hold no behaviour beyond their own consistency.
"""
