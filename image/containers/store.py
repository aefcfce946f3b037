"""The stored images, by name: `images` lists them, `run NAME` uses them, `rmi` removes them.

<cache>/containers/<id>/disk image.json     a packed image, and what it runs
<cache>/names/<name, quoted>                the id of the image that has this name now
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote_to_bytes

from caisson.image.build.cache import Cache, size_of
from caisson.image.containers.documents import Config
from caisson.image.errors import ImageError

STEP = "containers"
NAMES = "names"

#: A registry name: HOST/PATH:TAG@DIGEST, in lower case except for the tag.
NAME = re.compile(r"[a-z0-9][a-z0-9._/:-]{0,254}(:[A-Za-z0-9_][A-Za-z0-9_.-]{0,127})?(@sha256:[0-9a-f]{64})?")

#: Minimum digits to identify an image by id.
MIN_ID = 6


@dataclass(frozen=True)
class Stored:
    """An image in the store; ``config`` holds the fields of a Config, ``used`` is in seconds since 1970."""

    id: str
    names: tuple[str, ...]
    disk: Path
    bytes: int
    used: float
    config: dict[str, Any]


def describe(target: Path, config: Config) -> None:
    """Write an image's configuration beside its disk."""
    (target / "image.json").write_text(json.dumps(asdict(config)))


def with_tag(name: str) -> str:
    """Return a name with its tag, "latest" by default."""
    return name if ":" in name.rpartition("/")[2] or "@" in name else f"{name}:latest"


def _file_name(name: str) -> str:
    """Return the file name for an image's name, which may contain any bytes; never a hidden one."""
    quoted = quote(os.fsencode(name), safe="")
    return f"%2E{quoted[1:]}" if quoted.startswith(".") else quoted


def remember(cache: Cache, key: str, names: Iterable[str]) -> None:
    """Point names to an image."""
    place = cache.root / NAMES
    place.mkdir(parents=True, exist_ok=True)
    for name in names:
        new = place / f".{os.getpid()}"
        new.write_text(key)
        with contextlib.suppress(OSError):  # not a possible file name
            new.rename(place / _file_name(name))
        new.unlink(missing_ok=True)


def images(cache: Cache) -> list[Stored]:
    """Return the stored images, most recently used first."""
    names: dict[str, list[str]] = {}
    for file in sorted((cache.root / NAMES).glob("[!.]*")):
        with contextlib.suppress(FileNotFoundError):  # removed meanwhile
            names.setdefault(file.read_text(), []).append(os.fsdecode(unquote_to_bytes(file.name)))
    found = []
    for place in (cache.root / STEP).glob("[!.]*/"):
        with contextlib.suppress(OSError, ValueError, TypeError):  # removed meanwhile, or from an older version
            config = json.loads((place / "image.json").read_text())
            config = {key: tuple(value) if isinstance(value, list) else value for key, value in config.items()}
            Config(**config)
            used = (place / ".used").stat().st_mtime
            size = (place / "disk").stat().st_size
            found.append(Stored(place.name, tuple(names.get(place.name, ())), place / "disk", size, used, config))
    return sorted(found, key=lambda one: -one.used)


def find(cache: Cache, name: str) -> Stored | None:
    """Find an image by name, with or without tag, or by the first digits of its id."""
    stored = images(cache)
    wanted = with_tag(name)
    found = next((one for one in stored if wanted in one.names), None)
    if found is None and len(name) >= MIN_ID:
        matching = [one for one in stored if one.id.startswith(name)]
        found = matching[0] if len(matching) == 1 else None
    if found is not None:
        cache.get(STEP, found.id)  # mark it as used
    return found


def remove(cache: Cache, name: str) -> int:
    """Remove an image's name, and with the last name the image; returns the bytes freed.  Raises ImageError.

    VMs that have its disk plugged in keep it.
    """
    stored = find(cache, name)
    if stored is None:
        raise ImageError(f"{name}: no stored image of this name; list them: caisson images")
    wanted = with_tag(name)
    forgotten = [wanted] if wanted in stored.names else stored.names
    for one in forgotten:
        (cache.root / NAMES / _file_name(one)).unlink(missing_ok=True)
    if set(stored.names) - set(forgotten):
        return 0
    freed = size_of(stored.disk.parent)
    return freed if cache.remove(STEP, stored.id) else 0


def prune(cache: Cache, *, older: float = 0.0) -> list[Stored]:
    """Remove the images that have not been used for ``older`` seconds; returns them."""
    gone = [one for one in images(cache) if time.time() - one.used >= older]
    for one in gone:
        for name in one.names:
            (cache.root / NAMES / _file_name(name)).unlink(missing_ok=True)
        cache.remove(STEP, one.id)
    return gone
