"""Records that pass between the steps of a build: candidates and plans.

They have no behaviour beyond their own consistency.
"""
