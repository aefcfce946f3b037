"""Read directories of this machine into file trees: unchanged, or as a guest gets them."""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from caisson.image.errors import ImageError
from caisson.image.formats.beneath import FILE, Beneath
from caisson.image.formats.tree import ROOT, Extent, Node, Tree, split, text


def merge_directories(trees: Sequence[Path], extra: Mapping[str, Node]) -> Tree:
    """Merge directories, the last one on top, and further files, as a guest gets them.

    Everything in a guest belongs to root, is readable by all, from 1970 and not set-id: neither the builder nor the
    umask matters.  Of the mode, only the executable bits and a directory's sticky bit are kept.  A directory in the
    place of a link to one is that one: bin/ of a template is in usr/bin.  Raises ImageError, OSError.
    """
    tree = Tree()
    for top in trees:
        for place, names, files in os.walk(top, onerror=_raise):
            base = Path(place)
            for name in [*names, *files]:
                path = base / name
                _put(tree, os.fsencode(path.relative_to(top)), _guest_node(path))
    for name, node in extra.items():
        tree.put(os.fsencode(name), node)
    return tree


def _raise(error: OSError) -> None:
    raise error


def _put(tree: Tree, path: bytes, node: Node) -> None:
    """Put a file of an upper layer; a directory and a file cannot take each other's place."""
    found = tree.find(path)
    if found is not None and stat.S_ISLNK(found[1].mode):
        if node.is_directory and tree.find_directory(split(path)) is not None:
            return
    elif found is not None and node.is_directory != found[1].is_directory:
        below, here = ("a directory", "not one") if found[1].is_directory else ("not a directory", "one")
        raise ImageError(f"{text(path)}: is {below} in the guest, and {here} in a layer above it; rename yours")
    tree.put(path, node)


def _guest_node(path: Path) -> Node:
    state = path.lstat()
    if stat.S_ISLNK(state.st_mode):
        return Node(stat.S_IFLNK | 0o777, target=os.fsencode(path.readlink()))
    if stat.S_ISDIR(state.st_mode):
        return Node(stat.S_IFDIR | (0o1777 if state.st_mode & stat.S_ISVTX else 0o755))
    if not stat.S_ISREG(state.st_mode):
        raise ImageError(f"{path}: is a device, a FIFO or a socket; a guest's image has files, directories and links")
    mode = 0o755 if state.st_mode & stat.S_IXUSR else 0o644
    return Node(stat.S_IFREG | mode, size=state.st_size, file=os.fsencode(path))


def from_directory(root: Path | Beneath) -> Tree:
    """Return the tree of a directory of this machine, robust against concurrent changes.  Raises ImageError."""
    try:
        beneath = root if isinstance(root, Beneath) else Beneath.of(root)
    except OSError as error:
        raise ImageError(f"{root}: {error.strerror}") from error
    tree = Tree(beneath)
    try:
        _Scan(tree, beneath).run()
    except OSError as error:
        tree.close()
        raise ImageError(f"{os.fsdecode(error.filename or b'/')}: {error.strerror}") from error
    except ImageError:
        tree.close()
        raise
    return tree


class _Scan:
    """Read a directory and all below it, one directory at a time, each through its own descriptor."""

    def __init__(self, tree: Tree, beneath: Beneath) -> None:
        self._tree = tree
        self._beneath = beneath
        self._known: dict[tuple[int, int], int] = {}  # files with several names

    def run(self) -> None:
        """Fill the tree.  Raises OSError, ImageError."""
        state = os.fstat(self._beneath.descriptor)
        self._tree.change(ROOT, _attributes(state, self._beneath.descriptor))
        ways = [(b"", ROOT, (state.st_dev, state.st_ino))]
        while ways:
            place, parent, identity = ways.pop()
            with self._beneath.directory(place) as directory:
                state = os.fstat(directory.descriptor)
                if (state.st_dev, state.st_ino) != identity:
                    raise ImageError(f"{os.fsdecode(place)}: the directory was replaced while it was read")
                ways += self._entries(directory.descriptor, place, parent)

    def _entries(self, descriptor: int, place: bytes, parent: int) -> list[tuple[bytes, int, tuple[int, int]]]:
        """Add a directory's entries; return its subdirectories."""
        found = []
        with os.scandir(descriptor) as entries:
            for entry in entries:
                name = os.fsencode(entry.name)
                path = place + b"/" + name if place else name
                state = entry.stat(follow_symlinks=False)
                if stat.S_ISSOCK(state.st_mode):  # of a running program; images cannot contain it
                    continue
                identity = state.st_dev, state.st_ino
                number = self._known.get(identity)
                if number is None:
                    number = self._tree.add(_scanned(descriptor, name, path, state))
                    if stat.S_ISDIR(state.st_mode):
                        found.append((path, number, identity))
                    elif state.st_nlink > 1:
                        self._known[identity] = number
                        self._tree.share(number)
                self._tree.link(parent, name, number)
        return found


def _attributes(state: os.stat_result, file: int | bytes) -> Node:
    return Node(state.st_mode, state.st_uid, state.st_gid, max(0, int(state.st_mtime)), xattrs=_xattrs(file))


def _scanned(directory: int, name: bytes, path: bytes, state: os.stat_result) -> Node:
    """Return a directory's entry; its contents are read later, by path beneath the tree's directory."""
    node = _attributes(state, b"/proc/self/fd/%d/%s" % (directory, name))
    if stat.S_ISLNK(state.st_mode):
        return replace(node, target=os.readlink(name, dir_fd=directory))
    if stat.S_ISREG(state.st_mode):
        sparse = state.st_blocks * 512 < state.st_size
        extents = _extents(directory, name, state.st_size) if sparse else None
        return replace(node, size=state.st_size, file=path, extents=extents)
    if stat.S_ISCHR(state.st_mode) or stat.S_ISBLK(state.st_mode):
        return replace(node, device=(os.major(state.st_rdev), os.minor(state.st_rdev)))
    return node


def _xattrs(file: int | bytes) -> dict[str, bytes]:
    """Read extended attributes of an open directory, or of a path without following a link."""
    follow = isinstance(file, int)
    try:
        names = os.listxattr(file, follow_symlinks=follow)
        return {name: os.getxattr(file, name, follow_symlinks=follow) for name in names}
    except OSError:
        return {}  # a file system without them


def _extents(directory: int, name: bytes, size: int) -> tuple[Extent, ...] | None:
    """Return the data extents of a file (lseek(2), SEEK_DATA)."""
    found = []
    descriptor = os.open(name, FILE, dir_fd=directory)
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
