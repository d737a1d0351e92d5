"""Model directories: load, save, convert, publish."""
