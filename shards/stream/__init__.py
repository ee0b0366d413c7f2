"""Samples from storage to batches, in that order. Planned range reads, loader processes, an optional cache."""
