"""Errors of building an image, with messages for the user."""

from __future__ import annotations


class ImageError(Exception):
    """An image could not be built; the text names the problem, the cause and, if there is one, the remedy."""
