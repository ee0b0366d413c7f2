"""Recipes for training (`--config traffic`) and comparisons of them (`compare.py compare-layers`), as YAML files."""
