"""Recipes, one file per experiment, and their defaults.

`--config NAME` takes the name of a file in this package that defines `get_config`.
"""
