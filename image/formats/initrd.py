"""Writing an initramfs: a cpio archive in the "newc" format, without root and without device nodes on disk.

Source: Documentation/driver-api/early-userspace/buffer-format.rst.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from caisson.image.run import run

#: How an initrd may be packed, and the command that does it from stdin to stdout.
COMPRESSORS: dict[str, list[str]] = {
    "none": [],
    "gzip": ["gzip", "-9", "-n"],
    "lz4": ["lz4", "-l", "-9", "-c"],
    "zstd": ["zstd", "-19", "-T0", "-q", "-c"],
}


@dataclass(frozen=True)
class Entry:
    """One member: ``path`` without a leading slash, ``mode`` with its type bits."""

    path: str
    mode: int
    data: bytes = b""
    device: tuple[int, int] = (0, 0)


#: What the kernel opens or needs before devtmpfs is mounted.
CONSOLE = Entry("dev/console", stat.S_IFCHR | 0o600, device=(5, 1))


def entries_of(tree: Path) -> Iterator[Entry]:
    """A directory's members, parents first, sorted.

    Everything in a guest is root's, readable by all, and not set-id: neither who builds nor their umask plays a part.
    Of the mode only what is runnable, and which directory is for everyone's files, is taken over.
    """
    for directory, names, files in os.walk(tree):
        names.sort()
        base = Path(directory)
        links = [name for name in names if (base / name).is_symlink()]
        if base != tree:
            sticky = base.stat().st_mode & stat.S_ISVTX
            yield Entry(str(base.relative_to(tree)), stat.S_IFDIR | (0o1777 if sticky else 0o755))
        for name in sorted(files + links):
            path = base / name
            member = str(path.relative_to(tree))
            if path.is_symlink():
                yield Entry(member, stat.S_IFLNK | 0o777, os.fsencode(path.readlink()))
            else:
                runnable = path.stat().st_mode & stat.S_IXUSR
                yield Entry(member, stat.S_IFREG | (0o755 if runnable else 0o644), path.read_bytes())


def overlaid(trees: Sequence[Path], extra: Sequence[Entry]) -> Iterator[Entry]:
    """Trees laid over each other, the last one on top, with some more members; parents first, sorted."""
    members = {entry.path: entry for tree in trees for entry in entries_of(tree)}
    members |= {entry.path: entry for entry in extra}
    for path in sorted(members, key=lambda path: path.split("/")):
        yield members[path]


def write_cpio(target: BinaryIO, entries: Iterator[Entry]) -> None:
    """Write the archive.  Times are zero and inode numbers count up, so the same entries give the same bytes."""
    number = 0
    for number, entry in enumerate(entries, 1):
        _write(target, entry, number)
    _write(target, Entry("TRAILER!!!", 0), number + 1)


def _write(target: BinaryIO, entry: Entry, inode: int) -> None:
    name = os.fsencode(entry.path) + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.data), 0, 0, *entry.device, len(name), 0)
    head = b"070701" + b"".join(b"%08X" % field for field in fields) + name
    target.write(head + bytes(-len(head) % 4))
    target.write(entry.data + bytes(-len(entry.data) % 4))


def pack(archive: bytes, compression: str) -> bytes:
    """Compress an archive; raises ImageError when the tool is missing."""
    command = COMPRESSORS[compression]
    return run(command, stdin=archive) if command else archive
