"""The command `build-shards`: build, dry run, retry of what failed, and summaries. The other folders do the work."""
