"""Making and booting guests.  This half knows nothing of containers: it meets the agent only in proto/ and tasks.py.

`image.build(…)` makes an image, `image.Image.load(directory)` finds one that was made.  Both load the builder, with
jinja2 and YAML, when they are first asked for: a VM's supervisor and its vsock device start without.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from image.errors import ImageError

if TYPE_CHECKING:
    from image.builder import Image, build

__all__ = ["Image", "ImageError", "build"]


def __getattr__(name: str) -> Any:
    if name in ("Image", "build"):
        from image import builder

        return getattr(builder, name)
    raise AttributeError(name)
