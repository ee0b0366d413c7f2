"""The records that pass between the steps of a build: candidates, plans and outcomes.

They hold no behaviour beyond their own consistency.
"""
