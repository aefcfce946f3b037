"""Write an initramfs: a cpio archive in the "newc" format, without root and without device nodes on disk.

Source: Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import stat
from typing import BinaryIO

from caisson.image.build.choices import COMPRESSORS
from caisson.image.formats.tree import Node, Tree
from caisson.image.run import run

#: What the kernel opens or needs before devtmpfs is mounted.
CONSOLE = {"dev/console": Node.of(stat.S_IFCHR | 0o600, device=(5, 1))}


def write_cpio(target: BinaryIO, tree: Tree) -> None:
    """Write the archive.  Times are zero and inode numbers count up, so the same tree gives the same bytes."""
    number = 0
    for number, (path, node) in enumerate(tree.files(), 1):
        _write(target, path, node, number)
    _write(target, b"TRAILER!!!", Node(0), number + 1)


def _write(target: BinaryIO, path: bytes, node: Node, inode: int) -> None:
    name = path + b"\0"
    links = 2 if node.is_directory else 1
    fields = (inode, node.mode, 0, 0, links, 0, node.length, 0, 0, *node.device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    target.write(head + bytes(-len(head) % 4))
    target.write(node.read() + bytes(-node.length % 4))


def pack(archive: bytes, compression: str) -> bytes:
    """Compress an archive.  Raises ImageError if the tool is missing."""
    command = COMPRESSORS[compression]
    return run(command, stdin=archive) if command else archive
