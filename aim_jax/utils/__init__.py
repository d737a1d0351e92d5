"""Atomic file writes, image grids, plots, messages, progress and signals."""
