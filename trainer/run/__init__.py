"""A training run: its state, ranks, optimizer and log. All of it is stored, so a run resumes where it stopped."""
