"""What callers of the host's side get wrong."""

from __future__ import annotations


class Mistake(Exception):
    """What was asked for makes no sense, or cannot be done; the text says why, and what would be right."""
