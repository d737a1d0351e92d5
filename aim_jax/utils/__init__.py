"""Atomic file writes, image grids, plots, messages and progress."""
