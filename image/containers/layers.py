"""Layers of a container image laid over each other: a tree in memory, out of which one archive is written.

Nothing is unpacked on this machine, so neither root nor a file system with the right features is needed, and no name in
an archive can reach anything here.  Names are bytes, as on disk.  Source: OCI image specification, layer.md.
"""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO

from caisson.image.errors import ImageError

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"

#: Extended attributes in pax headers: of star and GNU tar, and of libarchive's older days.
XATTR = "SCHILY.xattr."

#: What overlayfs itself keeps in attributes: in a layer they would say which files to show in place of others.
OVERLAY = ("trusted.overlay.", "user.overlay.")

#: Links that are followed on the way to a name (path_resolution(7)).
MOST_LINKS = 40


class Malformed(ImageError):
    """An archive that is damaged, contradicts itself, or reaches for something outside of its root."""


@dataclass(eq=False)
class Node:
    """A file; hard links to it are the same node.  ``mode`` is that of stat(2), with the type."""

    mode: int
    uid: int = 0
    gid: int = 0
    mtime: int = 0
    xattrs: dict[str, bytes] = field(default_factory=dict)
    target: bytes = b""  # of a symbolic link
    device: tuple[int, int] = (0, 0)
    size: int = 0
    open: Callable[[], IO[bytes]] | None = None
    children: dict[bytes, Node] = field(default_factory=dict)

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def directory(mode: int = 0o755) -> Node:
    return Node(stat.S_IFDIR | mode)


class Tree:
    """A root, to which layers are added from the lowest on."""

    def __init__(self) -> None:
        self.root = directory()

    def add(self, archive: tarfile.TarFile) -> None:
        """Lay an archive over what is there.  It must stay open until the tree was written.  Raises Malformed."""
        members = []
        try:
            for member in archive:
                parts = _parts(member.name)
                if parts and parts[-1].startswith(WHITEOUT):
                    self._white_out(parts)  # only what is below: before anything of this layer is there
                else:
                    members.append((parts, member))
        except (tarfile.TarError, EOFError, ValueError) as error:
            raise Malformed(f"{_name(archive)}: not a tar archive, or a damaged one: {error}") from error
        _check_end(archive)
        for parts, member in members:
            self._place(archive, parts, member)

    def _white_out(self, parts: list[bytes]) -> None:
        *above, name = parts
        try:
            parent = self._directory(above, make=False)
        except FileNotFoundError:
            return
        hidden = name.removeprefix(WHITEOUT)
        if name == OPAQUE:
            parent.children.clear()
        elif hidden.startswith(WHITEOUT):
            return  # what aufs keeps for itself
        elif hidden in (b"", b".", b".."):
            raise Malformed(f"{_shown(parts)}: hides nothing that could be there")
        else:
            parent.children.pop(hidden, None)

    def _place(self, archive: tarfile.TarFile, parts: list[bytes], member: tarfile.TarInfo) -> None:
        node = self._link(parts, member) if member.islnk() else _node(archive, parts, member)
        if not parts:
            if not node.is_directory:
                raise Malformed("the root is to be something else than a directory")
            node.children = self.root.children
            self.root = node
            return
        parent = self._directory(parts[:-1], make=True)
        there = parent.children.get(parts[-1])
        if there is not None and there.is_directory and node.is_directory:
            node.children = there.children
        parent.children[parts[-1]] = node

    def _link(self, parts: list[bytes], member: tarfile.TarInfo) -> Node:
        target = _parts(member.linkname)
        try:
            node = self._directory(target[:-1], make=False).children[target[-1]]
        except (KeyError, IndexError, FileNotFoundError):
            raise Malformed(f"{_shown(parts)}: a hard link to {_shown(target)}, which is not there") from None
        if node.is_directory:
            raise Malformed(f"{_shown(parts)}: a hard link to {_shown(target)}, which is a directory")
        return node

    def ensure_directory(self, path: str) -> None:
        """Have a directory of this absolute path.  Raises Malformed where that cannot be."""
        self._directory(_parts(path), make=True)

    def _directory(self, parts: list[bytes], *, make: bool) -> Node:
        """The directory of this name; links on the way are followed, with "/" the tree's own root.

        Raises FileNotFoundError where there is none (unless told to make it), and Malformed for one that leads out.
        """
        way = [self.root]
        rest = list(reversed(parts))
        links = 0
        while rest:
            name = rest.pop()
            if name == b"..":
                if len(way) == 1:
                    raise Malformed(f"{_shown(parts)}: a link on the way leads out of the root")
                way.pop()
                continue
            node = way[-1].children.get(name)
            if node is None:
                if not make:
                    raise FileNotFoundError
                node = way[-1].children[name] = directory()
            if stat.S_ISLNK(node.mode):
                links += 1
                if links > MOST_LINKS:
                    raise Malformed(f"{_shown(parts)}: too many links on the way")
                if node.target.startswith(b"/"):
                    del way[1:]
                rest += [part for part in reversed(node.target.split(b"/")) if part not in (b"", b".")]
            elif node.is_directory:
                way.append(node)
            elif make:
                raise Malformed(f"{_shown(parts)}: below something that is no directory")
            else:
                raise FileNotFoundError
        return way[-1]


def walk(node: Node, path: bytes = b"") -> Iterator[tuple[bytes, Node]]:
    """All below a node, a directory before what is in it, in order of their names."""
    for name, child in sorted(node.children.items()):
        place = path + b"/" + name if path else name
        yield place, child
        yield from walk(child, place)


def from_directory(root: Path) -> Tree:
    """The tree of a directory of this machine, as it is there.  Raises ImageError."""
    tree = Tree()
    known: dict[tuple[int, int], Node] = {}

    def read(path: bytes) -> Node:
        state = os.lstat(path)
        identity = state.st_dev, state.st_ino
        if identity in known and not stat.S_ISDIR(state.st_mode):
            return known[identity]
        node = known[identity] = Node(state.st_mode, state.st_uid, state.st_gid, max(0, int(state.st_mtime)))
        for name in os.listxattr(path, follow_symlinks=False):
            _check_xattr(os.fsdecode(path), name)
            node.xattrs[name] = os.getxattr(path, name, follow_symlinks=False)
        if stat.S_ISLNK(state.st_mode):
            node.target = os.readlink(path)  # noqa: PTH115 - bytes
        elif stat.S_ISREG(state.st_mode):
            node.size = state.st_size
            node.open = partial(_opened, path)
        elif stat.S_ISCHR(state.st_mode) or stat.S_ISBLK(state.st_mode):
            node.device = os.major(state.st_rdev), os.minor(state.st_rdev)
        elif stat.S_ISDIR(state.st_mode):
            for entry in sorted(os.listdir(path)):  # noqa: PTH208 - bytes
                child = read(path + b"/" + entry)
                if not stat.S_ISSOCK(child.mode):  # of a program that runs here; no archive could hold it
                    node.children[entry] = child
        return node

    try:
        tree.root = read(os.fsencode(root))
    except OSError as error:
        raise ImageError(f"{os.fsdecode(error.filename or root)}: {error.strerror}") from error
    return tree


def _node(archive: tarfile.TarFile, parts: list[bytes], member: tarfile.TarInfo) -> Node:
    kinds = (
        (member.isfile(), stat.S_IFREG), (member.isdir(), stat.S_IFDIR), (member.issym(), stat.S_IFLNK),
        (member.ischr(), stat.S_IFCHR), (member.isblk(), stat.S_IFBLK), (member.isfifo(), stat.S_IFIFO),
    )  # fmt: skip
    kind = next((bits for holds, bits in kinds if holds), None)
    if kind is None:
        raise Malformed(f"{_shown(parts)}: of the kind {member.type!r}, which is not known")
    node = Node(kind | member.mode & 0o7777, member.uid, member.gid, max(0, int(member.mtime)))
    for name, value in member.pax_headers.items():
        if name.startswith(XATTR):
            attribute = name.removeprefix(XATTR)
            _check_xattr(_shown(parts), attribute)
            node.xattrs[attribute] = value.encode("utf-8", "surrogateescape")
    if member.issym():
        node.target = os.fsencode(member.linkname)
        if not node.target or b"\0" in node.target:
            raise Malformed(f"{_shown(parts)}: a link to nowhere")
    elif member.isfile():
        node.size = member.size

        def opened() -> IO[bytes]:
            stream = archive.extractfile(member)
            assert stream is not None  # it is a file
            return stream

        node.open = opened
    elif member.ischr() or member.isblk():
        node.device = member.devmajor, member.devminor
        if member.ischr() and node.device == (0, 0):
            raise Malformed(f"{_shown(parts)}: a device that hides files from overlayfs")
    return node


def _opened(path: bytes) -> IO[bytes]:
    return Path(os.fsdecode(path)).open("rb")


def _check_xattr(where: str, name: str) -> None:
    if name.startswith(OVERLAY):
        raise Malformed(f"{where}: the attribute {name} is for overlayfs alone")


def _check_end(archive: tarfile.TarFile) -> None:
    """tarfile takes a header that it cannot read for the end: only zeros are one (tar(5))."""
    assert archive.fileobj is not None
    archive.fileobj.seek(archive.offset)
    block = archive.fileobj.read(tarfile.BLOCKSIZE)
    if any(block) or len(block) < tarfile.BLOCKSIZE:
        raise Malformed(f"{_name(archive)}: not a tar archive, or a damaged one: no end where it should be")


def _name(archive: tarfile.TarFile) -> str:
    return str(archive.name).rpartition("/")[2]


def _parts(name: str) -> list[bytes]:
    """The components of a name.  Raises Malformed for one that leads out of the root."""
    parts = [part for part in os.fsencode(name).split(b"/") if part not in (b"", b".")]
    if b".." in parts:
        raise Malformed(f"{name!r}: a name that leads out of the root")
    if any(b"\0" in part or len(part) > 255 for part in parts):
        raise Malformed(f"{name[:80]!r}: not a name that a file can have")
    return parts


def _shown(parts: list[bytes]) -> str:
    return "/" + b"/".join(parts).decode(errors="replace")
