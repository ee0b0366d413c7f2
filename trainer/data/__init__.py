"""From the bytes of a sample to a batch of flat tensors.

Decoding, augmentation and mask bitmaps run in loader processes.
"""
