"""From the bytes of samples to batches of flat tensors, in loader processes. Masks are bitmaps that geometry moves."""
