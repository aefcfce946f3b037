"""Making and booting guests.  This half knows nothing of containers: it meets the agent only in proto/ and tasks.py."""

from image.build import Image, build
from image.errors import ImageError

__all__ = ["Image", "ImageError", "build"]
