"""The place that a build writes to: which build it belongs to, who holds its lock, and its dataset card.

A killed build resumes from what is recorded here.
"""
