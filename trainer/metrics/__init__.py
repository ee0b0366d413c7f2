"""How good detections are.

A metric has three methods: `process` adds images, `evaluate` scores those of all ranks, `reset` forgets them.
"""
