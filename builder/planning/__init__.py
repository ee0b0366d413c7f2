"""From the options of a user to a plan: images are selected, shards cut. Images that fail are replaced here, too."""
