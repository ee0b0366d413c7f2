"""How good detections are. A metric has two methods: `process` adds images, `evaluate` scores those of all ranks."""
