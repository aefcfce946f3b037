"""What can go wrong while making an image, in words for the person who asked for it."""

from __future__ import annotations


class ImageError(Exception):
    """An image could not be made; the text says what, why and, where there is one, the way out."""
