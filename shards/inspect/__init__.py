"""The command `inspect-shards`: count, verify and show a finished dataset, or extract samples from it."""
