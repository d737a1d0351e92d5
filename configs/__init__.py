"""Recipes, one file per experiment, beside their defaults.

`--config NAME` takes the name of a file here that has a `get_config`.
"""
