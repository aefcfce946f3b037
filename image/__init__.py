"""Build and boot guests.  This half is independent of the agent: they meet in proto/, commands/ and tasks.py.

`build_image(…)` builds an image, `Image.load(directory)` loads a built one.  Both import the builder, with jinja2 and
YAML, on first use: a VM's supervisor and its vsock device start without them.
"""

from __future__ import annotations

import importlib

from caisson.image.errors import ImageError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.image.build.builder import Build, Image, build_image, verify
    from caisson.image.build.cache import clean
    from caisson.image.build.definition import find, load, schema
    from caisson.image.build.lock import read as read_lock
    from caisson.image.build.manifest import plain
    from caisson.image.build.summary import describe, planned, summary

_FROM = {
    "Build": "caisson.image.build.builder.Build",
    "Image": "caisson.image.build.builder.Image",
    "build_image": "caisson.image.build.builder.build_image",
    "clean": "caisson.image.build.cache.clean",
    "describe": "caisson.image.build.summary.describe",
    "find": "caisson.image.build.definition.find",
    "load": "caisson.image.build.definition.load",
    "plain": "caisson.image.build.manifest.plain",
    "planned": "caisson.image.build.summary.planned",
    "read_lock": "caisson.image.build.lock.read",
    "schema": "caisson.image.build.definition.schema",
    "summary": "caisson.image.build.summary.summary",
    "verify": "caisson.image.build.builder.verify",
}

__all__ = [
    "Build", "Image", "ImageError", "build_image", "clean", "describe", "find", "load", "plain", "planned", "read_lock",
    "schema", "summary", "verify",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(name)
    module, _, attribute = _FROM[name].rpartition(".")
    return getattr(importlib.import_module(module), attribute)
