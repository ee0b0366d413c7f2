"""The root that a build writes to: the build it belongs to, its lock, and what an interrupted build resumes from."""
