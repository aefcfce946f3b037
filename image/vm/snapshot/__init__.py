"""Snapshots: the saved state of a running guest, and clones of it."""
