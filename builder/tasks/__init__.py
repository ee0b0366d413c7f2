"""Records that pass between the steps of a build: the plan, its tasks, and the images and annotations in them.

They have no behaviour beyond their own consistency.
"""
