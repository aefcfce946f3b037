"""Read directories of this machine into file trees: as they are, or as a guest is to have them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from caisson.image.errors import ImageError
from caisson.image.formats.tree import ROOT, Extent, Node, Tree


def overlaid(trees: Sequence[Path], extra: Mapping[str, Node]) -> Tree:
    """Return directories laid over each other, the last one on top, and some more files, as a guest has them.

    Everything in a guest is root's, readable by all, from 1970 and not set-id: neither who builds nor their umask plays
    a part.  Of the mode only what is runnable, and which directory is for everyone's files, is taken over.
    """
    tree = Tree()
    for top in trees:
        for place, names, files in os.walk(top):
            base = Path(place)
            for name in [*names, *files]:
                path = base / name
                tree.put(os.fsencode(path.relative_to(top)), _as_in_a_guest(path))
    for name, node in extra.items():
        tree.put(os.fsencode(name), node)
    return tree


def _as_in_a_guest(path: Path) -> Node:
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):
        return Node(stat.S_IFLNK | 0o777, target=os.fsencode(path.readlink()))
    if stat.S_ISDIR(state.st_mode):
        return Node(stat.S_IFDIR | (0o1777 if state.st_mode & stat.S_ISVTX else 0o755))
    mode = 0o755 if state.st_mode & stat.S_IXUSR else 0o644
    return Node(stat.S_IFREG | mode, size=state.st_size, file=os.fsencode(path))


def from_directory(root: Path) -> Tree:
    """Return the tree of a directory of this machine.  Raises ImageError."""
    tree = Tree()
    known: dict[tuple[int, int], int] = {}  # files with several names
    ways: list[tuple[bytes, int]] = [(os.fsencode(root), ROOT)]
    try:
        tree.change(ROOT, _scanned(os.fsencode(root)))
        while ways:
            place, parent = ways.pop()
            with os.scandir(place) as entries:
                for entry in entries:
                    state = entry.stat(follow_symlinks=False)
                    if stat.S_ISSOCK(state.st_mode):  # of a running program; an image cannot hold it
                        continue
                    identity = state.st_dev, state.st_ino
                    number = known.get(identity)
                    if number is None:
                        number = tree.add(_scanned(entry.path, state))
                        if stat.S_ISDIR(state.st_mode):
                            ways.append((entry.path, number))
                        elif state.st_nlink > 1:
                            known[identity] = number
                            tree.share(number)
                    tree.link(parent, entry.name, number)
    except OSError as error:
        tree.close()
        raise ImageError(f"{os.fsdecode(error.filename or root)}: {error.strerror}") from error
    return tree


def _scanned(path: bytes, state: os.stat_result | None = None) -> Node:
    state = state or os.lstat(path)
    node = Node(state.st_mode, state.st_uid, state.st_gid, max(0, int(state.st_mtime)), xattrs=_xattrs(path))
    if stat.S_ISLNK(state.st_mode):
        return replace(node, target=os.readlink(path))  # noqa: PTH115 - bytes
    if stat.S_ISREG(state.st_mode):
        sparse = state.st_blocks * 512 < state.st_size
        return replace(node, size=state.st_size, file=path, extents=_extents(path, state.st_size) if sparse else None)
    if stat.S_ISCHR(state.st_mode) or stat.S_ISBLK(state.st_mode):
        return replace(node, device=(os.major(state.st_rdev), os.minor(state.st_rdev)))
    return node


def _xattrs(path: bytes) -> dict[str, bytes]:
    try:
        return {
            name: os.getxattr(path, name, follow_symlinks=False) for name in os.listxattr(path, follow_symlinks=False)
        }
    except OSError:
        return {}  # a file system without them


def _extents(path: bytes, size: int) -> tuple[Extent, ...] | None:
    """Return where a file has data (lseek(2), SEEK_DATA)."""
    found = []
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        at = 0
        with contextlib.suppress(OSError):  # ENXIO: no more data
            while at < size:
                start = os.lseek(descriptor, at, os.SEEK_DATA)
                at = min(os.lseek(descriptor, start, os.SEEK_HOLE), size)
                found.append(Extent(start, at - start, start))
    finally:
        os.close(descriptor)
    return tuple(found)
