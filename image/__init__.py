"""Making and booting guests.  This half knows nothing of containers: it meets the agent only in proto/ and tasks.py.

`image.build(…)` makes an image, `image.Image.load(directory)` finds one that was made.  Both load the builder, with
jinja2 and YAML, when they are first asked for: a VM's supervisor and its vsock device start without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from image.errors import ImageError

if TYPE_CHECKING:
    from image.builder import Build, Image, build
    from image.cache import clean
    from image.definition import find, load, schema
    from image.manifest import plain
    from image.summary import describe, planned, summary

__all__ = [
    "Build",
    "Image",
    "ImageError",
    "build",
    "clean",
    "describe",
    "find",
    "load",
    "plain",
    "planned",
    "schema",
    "summary",
]

_FROM = {
    "image.builder": ("Build", "Image", "build"),
    "image.cache": ("clean",),
    "image.definition": ("find", "load", "schema"),
    "image.manifest": ("plain",),
    "image.summary": ("describe", "planned", "summary"),
}


def __getattr__(name: str) -> Any:
    for module, names in _FROM.items():
        if name in names:
            return getattr(importlib.import_module(module), name)
    raise AttributeError(name)
