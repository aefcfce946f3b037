"""The programs that pack an image: this machine's, or those of the image's own package snapshot.

Each version of mkfs.erofs and mksquashfs lays out its files in another way.  With the versions that the snapshot has,
an image is the same on every host: they run where they were unpacked, by their own loader with their own libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from caisson.image.errors import ImageError

#: The Debian packages of what packs file systems; what they depend on has to be unpacked with them.
PACKAGES = ("erofs-utils", "squashfs-tools")

#: Where program loaders are, in a directory of libraries: glibc's, and musl's.
LOADERS = ("*/ld-linux-*.so.*", "ld-musl-*.so.1")


@dataclass(frozen=True)
class Tools:
    """Where programs are taken from: ``tree`` has unpacked packages of an architecture that this machine runs.

    Without a tree they are those in PATH.
    """

    tree: Path | None = None

    def command(self, program: str) -> list[str]:
        """Return the words that start a program.  Raises ImageError when the tree lacks it, or a loader for it."""
        if self.tree is None:
            return [program]
        file = _first(self.tree, f"usr/bin/{program}", f"usr/sbin/{program}", f"bin/{program}", f"sbin/{program}")
        loader = _first(self.tree, *(f"{place}/{name}" for name in LOADERS for place in ("usr/lib", "lib")))
        if file is None or loader is None:
            raise ImageError(f"{self.tree}: {program if loader else 'a program loader'} is not among the tools there")
        triplet = loader.parent.name if loader.parent.name != "lib" else ""
        libraries = ":".join(str(self.tree / place / triplet) for place in ("usr/lib", "lib"))
        return [str(loader), "--library-path", libraries, str(file)]


#: This machine's own.
HOST = Tools()


def _first(tree: Path, *patterns: str) -> Path | None:
    return next((path for pattern in patterns for path in sorted(tree.glob(pattern))), None)
