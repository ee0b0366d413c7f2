"""The commands train, evaluate, predict and compare. Each reads from top to bottom and calls the folders below."""
