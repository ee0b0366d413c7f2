"""The commands train, evaluate, predict, compare, recipes, and the model of `export`.

They share signals, exit statuses and the launcher.
"""
