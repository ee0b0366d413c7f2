"""The root that a build writes to. It holds the lock, and what an interrupted build resumes from."""
