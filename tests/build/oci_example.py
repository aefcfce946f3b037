"""Provide one image in every format: its layers, its configuration, and the expected results of reading it."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caisson.image.build.cache import Cache
from caisson.image.containers.documents import Config
from caisson.image.containers.oci import Packed, pack_image
from tests.build.container_images import (
    FOLDER,
    file,
    layer,
)

LAYERS = (layer(("bin", FOLDER), ("bin/sh", file(b"#!", mode=0o755))), layer(("etc/motd", file(b"hello"))))
CONFIG: dict[str, Any] = {
    "Entrypoint": ["/entry"], "Cmd": ["a", "b"], "Env": ["A=1"], "User": "web:logs", "WorkingDir": "/srv",
}  # fmt: skip


READ = Config(("/entry",), ("a", "b"), ("A=1",), "web:logs", "/srv")


def read(path: Path, architecture: str = "amd64") -> Packed:
    with pack_image(path, architecture, Cache(path.parent / "cache")) as image:
        return image


def rewritten(layout: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change an index."""
    index = json.loads((layout / "index.json").read_text())
    change(index)
    (layout / "index.json").write_text(json.dumps(index))


def listed(path: Path) -> set[str]:
    """Return the names on an image's disk."""
    with pack_image(path, "amd64", Cache(path.parent / "cache")) as image:
        done = subprocess.run(["unsquashfs", "-l", image.disk], capture_output=True, text=True, check=True)
    return {line.removeprefix("squashfs-root/") for line in done.stdout.splitlines()}
