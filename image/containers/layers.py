"""Apply the layers of a container image to a file tree.

Nothing is unpacked on this machine, so neither root nor particular file system features are needed, and no name in an
archive can reach anything here.  Source: OCI image specification, layer.md.
"""

from __future__ import annotations

import stat
from pathlib import Path
from typing import IO

from caisson.image.containers.tar import HARD_LINK, Member, members
from caisson.image.formats.squashfs import Warn
from caisson.image.formats.tree import Malformed, Node, Tree, directory, split, text

WHITEOUT = b".wh."
OPAQUE = b".wh..wh..opq"

#: Private files of aufs at the root: among them those that layers of old engines hard-link to.
AUFS, AUFS_LINKS = b".wh..wh.", b".wh..wh.plnk"

#: Maximum names in all layers of an image.
MAX_ENTRIES = 1 << 22


class LayerMerger:
    """Merge the layers of an image into a tree, lowest first."""

    def __init__(self, tree: Tree, warn: Warn, max_file: int) -> None:
        self.tree = tree
        self._warn = warn
        self._max_file = max_file
        self._entries = 0

    def apply(self, file: Path, shown: str) -> None:
        """Apply a layer, an uncompressed archive; the tree's contents stay in it.  Raises Malformed."""
        with file.open("rb") as stream:
            self._white_out(stream, shown)
            aufs = self.tree.add(directory())  # a directory without a name, removed after this layer
            for member in members(stream, shown, self._max_file):
                self._place(member, str(file).encode(), aufs)

    def _white_out(self, stream: IO[bytes], shown: str) -> None:
        """Apply whiteouts, which only hide lower layers, so before any of this layer's files is added."""
        for member in members(stream, shown, self._max_file):
            self._entries += 1
            if self._entries > MAX_ENTRIES:
                raise Malformed(f"{shown}: more than {MAX_ENTRIES} files in an image")
            parts = split(member.name)
            if not parts or not parts[-1].startswith(WHITEOUT) or (parts[0].startswith(AUFS) and parts[0] != OPAQUE):
                continue
            parent = self.tree.find_directory(parts[:-1])
            hidden = parts[-1].removeprefix(WHITEOUT)
            if parts[-1] != OPAQUE and hidden in (b"", b".", b".."):
                raise Malformed(f"{text(member.name)}: a whiteout with an invalid name")
            if parent is None or (hidden.startswith(WHITEOUT) and parts[-1] != OPAQUE):
                continue
            if parts[-1] == OPAQUE:
                self.tree.clear(parent)
            else:
                self.tree.unlink(parent, hidden)

    def _place(self, member: Member, file: bytes, aufs: int) -> None:
        parts = split(member.name)
        if parts and parts[0] == AUFS_LINKS:
            if len(parts) > 1 and member.kind == stat.S_IFREG:
                self.tree.link(aufs, parts[-1], self.tree.add(self._node(member, file)))
        elif any(part.startswith(AUFS) for part in parts[:1]) or (parts and parts[-1].startswith(WHITEOUT)):
            return
        elif member.kind == HARD_LINK:
            self._link(member, parts, aufs)
        else:
            self.tree.put(b"/".join(parts), self._node(member, file))

    def _link(self, member: Member, parts: list[bytes], aufs: int) -> None:
        shown = f"{text(member.name)}: a hard link to {text(member.link)}"
        target = split(member.link)
        if not parts or not target:
            raise Malformed(f"{shown}: a directory")
        parent = aufs if target[0] == AUFS_LINKS else self.tree.find_directory(target[:-1])
        number = None if parent is None else self.tree.child(parent, target[-1])
        if number is None:
            raise Malformed(f"{shown}: not there")
        if self.tree.node(number).is_directory:
            raise Malformed(f"{shown}: a directory")
        self.tree.share(number)
        self.tree.link(self.tree.make_directory(parts[:-1]), parts[-1], number)

    def _node(self, member: Member, file: bytes) -> Node:
        if member.kind == stat.S_IFLNK and not member.link:
            raise Malformed(f"{text(member.name)}: a dangling link")
        if member.kind == stat.S_IFCHR and member.device == (0, 0):
            raise Malformed(f"{text(member.name)}: a device that overlayfs takes for a whiteout")
        for what in member.dropped:
            self._warn(f"{text(member.name)}: {what}: not kept")
        return Node(
            member.kind | member.mode, member.uid, member.gid, max(0, member.mtime),
            target=member.link if member.kind == stat.S_IFLNK else b"", device=member.device, size=member.size,
            file=file if member.kind == stat.S_IFREG else b"", offset=member.data, extents=member.extents,
            xattrs=member.xattrs,
        )  # fmt: skip
