"""The commands train, evaluate, predict and compare. They share signals, exit statuses and the launcher."""
