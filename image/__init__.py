"""Making and booting guests.  This half knows nothing of containers: it meets the agent only in proto/ and tasks.py.

`image.build(…)` makes an image, `image.Image.load(directory)` finds one that was made.  Both load the builder, with
jinja2 and YAML, when they are first asked for: a VM's supervisor and its vsock device start without.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from image.errors import ImageError

if TYPE_CHECKING:
    from image.builder import Build, Image, build, verify
    from image.cache import clean
    from image.definition import find, load, schema
    from image.lock import read as read_lock
    from image.manifest import plain
    from image.summary import describe, planned, summary

_FROM = {
    "Build": "image.builder.Build",
    "Image": "image.builder.Image",
    "build": "image.builder.build",
    "clean": "image.cache.clean",
    "describe": "image.summary.describe",
    "find": "image.definition.find",
    "load": "image.definition.load",
    "plain": "image.manifest.plain",
    "planned": "image.summary.planned",
    "read_lock": "image.lock.read",
    "schema": "image.definition.schema",
    "summary": "image.summary.summary",
    "verify": "image.builder.verify",
}

__all__ = [
    "Build", "Image", "ImageError", "build", "clean", "describe", "find", "load", "plain", "planned", "read_lock",
    "schema", "summary", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(name)
    module, _, attribute = _FROM[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
