"""Train and apply Mask R-CNN on shards. The commands use the model, its data, the run and the metrics below them."""
