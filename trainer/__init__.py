"""From shards to Mask R-CNN: batches, model, loop, metrics and predictions."""
