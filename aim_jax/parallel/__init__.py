"""Meshes, sharding rules, and the start of several processes."""
