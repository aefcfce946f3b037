"""The programs that pack an image: this machine's, or those of the image's own package snapshot.

Each version of mkfs.erofs and mksquashfs lays out files differently.  With the snapshot's versions, an image is the
same on every host: they run from where they were unpacked, with their own loader and libraries.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from caisson.image.errors import ImageError

#: The Debian packages with the packing programs; their dependencies must be unpacked with them.
PACKAGES = ("erofs-utils", "squashfs-tools")

#: Program loaders in a directory of libraries: glibc's, and musl's.
LOADERS = ("*/ld-linux-*.so.*", "ld-musl-*.so.1")


@dataclass(frozen=True)
class Tools:
    """The source of programs: ``tree`` has unpacked packages of an architecture that this machine runs.

    Without a tree, PATH is used.
    """

    tree: Path | None = None

    def command(self, program: str) -> list[str]:
        """Return the command that starts a program.  Raises ImageError if the tree lacks it, or its loader."""
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
