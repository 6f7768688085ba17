"""Estimates before a run: memory, work, and the bounds of a chip."""
