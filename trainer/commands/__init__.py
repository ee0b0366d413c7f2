"""The commands train, evaluate, predict and compare, and what they share."""
