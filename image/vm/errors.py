"""What can go wrong with a virtual machine, in words for the person who started it."""

from __future__ import annotations


class VMError(Exception):
    """A VM could not be started, found or kept; the text says what, why and, where there is one, the way out."""
