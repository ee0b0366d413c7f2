"""The commands train, evaluate, predict and compare, and what they share.

Each command reads from top to bottom and uses the other folders of the package.
"""
