"""From what a user asks for to a plan: images are selected, masks located, shards cut.

Replacements for images that are unavailable are planned here, too.
"""
