"""A training run: its state, its ranks, its optimizer, its folder and log.

Everything that a resumed run needs is kept here.
"""
