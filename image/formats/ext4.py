"""Write a read-only ext4 file system: sized exactly, byte for byte the same everywhere.

mke2fs takes owners, times and order from a directory, and from an archive only since 1.47.1, which not every supported
suite has; its layout depends on /etc and its version, and leaves room to grow.  Here everything is derived from the
members.  What a read-only file system does not need is left out: journal, free blocks, backups of the superblock.

    block 0      superblock (at byte 1024)
    then         group descriptors, block bitmaps, inode bitmaps, inode tables of all groups (flex_bg)
    then         contents, each contiguous, in the order of the members

Source: Linux Documentation/filesystems/ext4/ (super, group_descr, inodes, ifork, directory, bitmaps).
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from caisson.image.errors import ImageError
from caisson.image.formats.tree import Node, directory, text

BLOCK = 4096

_PER_GROUP = 8 * BLOCK  # blocks: as many as a block of bits counts
_INODE_SIZE = 256
_INODES_PER_BLOCK = BLOCK // _INODE_SIZE
_ROOT, _LOST_FOUND, _FIRST = 2, 11, 12  # inodes 1 to 10 are reserved

_SPARSE_SUPER2 = 0x200  # compatible: backups of the superblock where it says, which is nowhere
_INCOMPATIBLE = 0x2 | 0x40 | 0x200  # types in directory entries, extents, flex_bg
_READ_ONLY_COMPATIBLE = 0x40  # inodes with the fields behind the first 128 bytes

_EXTENTS_FLAG = 0x80000
_EXTENT_BLOCKS = 32768
_EXTENTS_IN_INODE = 4
_FAST_LINK = 60
_TYPES = {stat.S_IFREG: 1, stat.S_IFDIR: 2, stat.S_IFLNK: 7}


@dataclass
class _Inode:
    """A file's location: its number, links and first block; ``records`` are a directory's names, and its contents."""

    number: int
    node: Node
    links: int = 1
    start: int = 0
    names: dict[bytes, _Inode] = field(default_factory=dict)
    records: bytes = b""

    @property
    def mode(self) -> int:
        return self.node.mode

    @property
    def size(self) -> int:
        return len(self.records) or self.node.length

    @property
    def blocks(self) -> int:
        if stat.S_ISLNK(self.mode) and self.size < _FAST_LINK:
            return 0
        return -(-self.size // BLOCK)


def write_ext4(target: Path, members: Iterable[tuple[bytes, Node]], uuid: UUID) -> None:
    """Write the members, each after its directory, into a file system without free space.

    Everything belongs to root and has the time 0.  ``uuid`` names the file system and seeds its hashes.  Raises
    ImageError for anything but files, directories and links, and for a file of more than 512 MiB.
    """
    nodes = _inodes(members)
    inodes = _FIRST + len(nodes) - 2 - 1  # the last number in use; the root and lost+found have those below
    contents = sum(node.blocks for node in nodes)
    groups = 1
    while (plan := _Plan(groups, inodes, contents)).blocks > groups * _PER_GROUP:
        groups += 1
    place = plan.first_data
    for node in nodes:
        node.start = place
        place += node.blocks
    with target.open("wb") as stream:
        stream.write(bytes(1024) + _superblock(plan, inodes, uuid))
        stream.seek(BLOCK)
        stream.write(_descriptors(plan, inodes, nodes))
        _write_bitmaps(stream, plan, inodes)
        for node in nodes:
            stream.seek(plan.inode_tables * BLOCK + (node.number - 1) * _INODE_SIZE)
            stream.write(_inode(node))
        for node in nodes:
            if node.blocks:
                stream.seek(node.start * BLOCK)
                stream.write(node.records or node.node.read())
        stream.truncate(plan.blocks * BLOCK)


class _Plan:
    """The layout in blocks, for a number of groups."""

    def __init__(self, groups: int, inodes: int, contents: int) -> None:
        self.groups = groups
        per_group = -(-inodes // groups)
        self.table_blocks = -(-per_group // _INODES_PER_BLOCK)
        self.inodes_per_group = self.table_blocks * _INODES_PER_BLOCK
        if self.inodes_per_group > 8 * BLOCK:
            raise ImageError(f"ext4: {inodes} files are more than {groups} groups can hold; choose another format")
        self.block_bitmaps = 1 + -(-groups * 32 // BLOCK)
        self.inode_bitmaps = self.block_bitmaps + groups
        self.inode_tables = self.inode_bitmaps + groups
        self.first_data = self.inode_tables + groups * self.table_blocks
        self.blocks = self.first_data + contents

    def inodes_used(self, group: int, last: int) -> int:
        return max(0, min(self.inodes_per_group, last - group * self.inodes_per_group))


def _inodes(members: Iterable[tuple[bytes, Node]]) -> list[_Inode]:
    """Return the inodes in the order of the members, after the root and lost+found; directories with their blocks."""
    root = _Inode(_ROOT, directory())
    lost = _Inode(_LOST_FOUND, directory(0o700))
    root.names[b"lost+found"] = lost
    nodes = [root, lost]
    places = {b"": root}
    parents = {_ROOT: root, _LOST_FOUND: root}
    for path, node in members:
        if stat.S_IFMT(node.mode) not in _TYPES:
            raise ImageError(f"{text(path)}: is not a file, directory or link (mode {node.mode:o})")
        if path == b"lost+found":
            raise ImageError("lost+found: is already in every ext4 file system; remove it from the tree")
        inode = _Inode(_FIRST + len(nodes) - 2, node)
        if inode.blocks > _EXTENTS_IN_INODE * _EXTENT_BLOCKS:
            raise ImageError(f"{text(path)}: is larger than 512 MiB; choose another format")
        parent, _, name = path.rpartition(b"/")
        places[parent].names[name] = inode
        parents[inode.number] = places[parent]
        if node.is_directory:
            places[path] = inode
        nodes.append(inode)
    for inode in nodes:
        if inode.node.is_directory:
            inode.records = _directory(inode, parents[inode.number])
            inode.links = 2 + sum(child.node.is_directory for child in inode.names.values())
    return nodes


def _directory(node: _Inode, parent: _Inode) -> bytes:
    records = [(b".", node), (b"..", parent), *sorted(node.names.items())]
    done, block = b"", b""
    last = 0  # where the last record of the block starts: it takes the rest of the block
    for name, child in records:
        size = -(-(8 + len(name)) // 4) * 4
        if len(block) + size > BLOCK:
            done += _filled(block, last)
            block = b""
        last = len(block)
        kind = _TYPES[stat.S_IFMT(child.mode)]
        block += struct.pack("<IHBB", child.number, size, len(name), kind) + name.ljust(size - 8, b"\0")
    return done + _filled(block, last)


def _filled(block: bytes, last: int) -> bytes:
    size = struct.pack("<H", BLOCK - last)
    return (block[: last + 4] + size + block[last + 6 :]).ljust(BLOCK, b"\0")


def _inode(node: _Inode) -> bytes:
    flags = 0 if stat.S_ISLNK(node.mode) and not node.blocks else _EXTENTS_FLAG
    content = _extents(node) if flags else node.node.target
    return struct.pack(
        "<HHIIIIIHHIII60sIIII12sH",
        node.mode, 0, node.size, 0, 0, 0, 0, 0, node.links, node.blocks * (BLOCK // 512), flags, 0,
        content, 0, 0, 0, 0, b"", 32,
    ).ljust(_INODE_SIZE, b"\0")  # fmt: skip


def _extents(node: _Inode) -> bytes:
    pieces = [
        struct.pack("<IHHI", at, min(_EXTENT_BLOCKS, node.blocks - at), 0, node.start + at)
        for at in range(0, node.blocks, _EXTENT_BLOCKS)
    ]
    return struct.pack("<HHHHI", 0xF30A, len(pieces), _EXTENTS_IN_INODE, 0, 0) + b"".join(pieces)


def _superblock(plan: _Plan, last: int, uuid: UUID) -> bytes:
    inodes = plan.groups * plan.inodes_per_group
    head = struct.pack(
        "<13I6H4I2HI2H3I16s",
        inodes, plan.blocks, 0, 0, inodes - last,  # blocks: reserved and free
        0, 2, 2, _PER_GROUP, _PER_GROUP, plan.inodes_per_group,  # blocks and clusters of 1024 << 2
        0, 0, 0, 0xFFFF, 0xEF53, 1, 1, 0,  # never mounted, clean, go on after errors
        0, 0, 0, 1,  # not to be checked, Linux, revision 1
        0, 0, _LOST_FOUND, _INODE_SIZE, 0,
        _SPARSE_SUPER2, _INCOMPATIBLE, _READ_ONLY_COMPATIBLE, uuid.bytes,
    )  # fmt: skip
    block = bytearray(1024)
    block[: len(head)] = head
    block[0xEC:0xFD] = uuid.bytes + b"\x01"  # the seed, and half MD4
    struct.pack_into("<HH", block, 0x15C, 32, 32)  # what inodes have behind the first 128 bytes, at least
    struct.pack_into("<I", block, 0x160, 1)  # hashes of names are those of signed characters
    return bytes(block)


def _descriptors(plan: _Plan, last: int, nodes: Sequence[_Inode]) -> bytes:
    directories = [0] * plan.groups
    for node in nodes:
        if stat.S_ISDIR(node.mode):
            directories[(node.number - 1) // plan.inodes_per_group] += 1
    return b"".join(
        struct.pack(
            "<IIIHHHHIHHHH",
            plan.block_bitmaps + group, plan.inode_bitmaps + group, plan.inode_tables + group * plan.table_blocks,
            0, plan.inodes_per_group - plan.inodes_used(group, last), directories[group], 0, 0, 0, 0, 0, 0,
        )
        for group in range(plan.groups)
    )  # fmt: skip


def _write_bitmaps(stream: BinaryIO, plan: _Plan, last: int) -> None:
    """Mark every block as in use, including nonexistent ones; likewise inodes."""
    stream.seek(plan.block_bitmaps * BLOCK)
    stream.write(b"\xff" * BLOCK * plan.groups)
    for group in range(plan.groups):
        used = (1 << plan.inodes_used(group, last)) - 1
        missing = (1 << 8 * BLOCK) - (1 << plan.inodes_per_group)
        stream.write((used | missing).to_bytes(BLOCK, "little"))
