"""Meshes, sharding rules and multi-process initialization."""
