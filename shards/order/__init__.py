"""The order in which the samples of one or several datasets are visited.

Arithmetic on numpy arrays only: no I/O, and any position is computed from its number alone.
"""
