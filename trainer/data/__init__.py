"""From the bytes of a sample to a batch of flat tensors, in loader processes.

Images are decoded and augmented, and each mask becomes a small bitmap that geometry moves without resampling it.
"""
