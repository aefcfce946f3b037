"""The composition root: user commands over both halves."""
