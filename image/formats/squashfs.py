"""Write a file tree as a read-only disk that a guest can mount, without root: with sqfstar(1), from a stream.

Not erofs: its mkfs takes owners, attributes and devices from a tree on disk that only root could create, or from an
archive only since 1.7, which Debian 12 does not have.  Nothing is compressed: emulated guests would pay for that at
each read.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO

from caisson.image.errors import ImageError
from caisson.image.formats.tree import Extent, Node, Tree, text
from caisson.image.programs import which
from caisson.image.run import INHERITED, CommandFailed, MissingProgram

PROGRAM = "sqfstar"
OPTIONS = ("-quiet", "-no-progress", "-noI", "-noId", "-noD", "-noF", "-noX", "-reproducible", "-mkfs-time", "0")

TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFCHR: tarfile.CHRTYPE,
    stat.S_IFBLK: tarfile.BLKTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}

#: Capacities of header fields (tar(5)): octal digits, and bytes of a name.
MAX_ID = 0o7777777
MAX_SIZE = 0o77777777777
MAX_FIELD_NAME = 99

#: Times in a squashfs have 32 bits.
MAX_TIME = (1 << 32) - 1

#: The attribute namespaces that squashfs supports, and overlayfs's own attributes.
XATTRS = ("user.", "trusted.", "security.")
OVERLAY = ("trusted.overlay.", "user.overlay.")
MAX_XATTR = 1 << 16
MAX_XATTR_NAMES = 1 << 16  # per file, with a NUL each (limits.h, XATTR_LIST_MAX)

#: Receives a line about each dropped item.
Warn = Callable[[str], None]


def write_squashfs(
    tree: Tree, target: Path, warn: Warn = lambda line: None, count: Callable[[int], None] = lambda size: None
) -> None:
    """Write a disk with an entire tree, except the root directory's own attributes.

    ``count`` gets the bytes of data written.  Raises ImageError if a program is missing or fails, or a file changes
    meanwhile.
    """
    program = which(PROGRAM)
    if program is None:
        raise MissingProgram(PROGRAM)
    words = [program, *OPTIONS, str(target)]
    environment = {name: value for name, value in os.environ.items() if INHERITED.fullmatch(name)}
    with subprocess.Popen(
        words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin as stream:
                write_archive(tree, stream, warn, count)
        except BrokenPipeError:
            pass  # its message says why
        except BaseException:
            process.kill()
            raise
        said = process.stdout.read().decode(errors="replace")
        if status := process.wait():
            raise CommandFailed(words, status, said)


def write_archive(
    tree: Tree, stream: IO[bytes], warn: Warn = lambda line: None, count: Callable[[int], None] = lambda size: None
) -> None:
    """Write a tree as a tar archive, in the dialect that squashfs-tools reads losslessly.

    Attributes are pax records; long names and holes are GNU's: in pax names it drops a link's leading "/" or "..".
    """
    for path, node, first in tree.walk():
        stream.write(_header(path, node, first, kept_xattrs(path, node.xattrs, warn)))
        if first is None and node.is_file:
            _write_contents(path, node, stream, count)
    stream.write(bytes(2 * tarfile.BLOCKSIZE))


def kept_xattrs(path: bytes, xattrs: Mapping[str, bytes], warn: Warn) -> dict[str, bytes]:
    """Return the attributes that a disk supports; ``warn`` gets the names of the others."""
    kept: dict[str, bytes] = {}
    names = 0
    for name, value in xattrs.items():
        names += len(os.fsencode(name)) + 1
        if names > MAX_XATTR_NAMES:
            warn(f"{text(path)}: attributes after the first {len(kept)}: not kept: a kernel could not list them")
            break
        if name.startswith(OVERLAY):
            warn(f"{text(path)}: attribute {name[:80]}: not kept: it is overlayfs's own")
        elif "=" in name:
            warn(f"{text(path)}: attribute {name[:80]!r}: not kept: an archive's records cannot hold its name")
        elif name.startswith(XATTRS) and len(value) <= MAX_XATTR and 0 < len(os.fsencode(name.partition(".")[2])) < 256:
            kept[name] = value
        else:
            warn(f"{text(path)}: attribute {name[:80]!r}: not kept: the disk's format cannot hold it")
    return kept


def _write_contents(path: bytes, node: Node, stream: IO[bytes], count: Callable[[int], None]) -> None:
    written = 0
    try:
        for piece in node.contents():
            stream.write(piece)
            written += len(piece)
            count(len(piece))
    except ImageError as error:
        raise ImageError(f"{text(path)}: {error}") from error
    stream.write(bytes(-written % tarfile.BLOCKSIZE))


def _header(path: bytes, node: Node, link: bytes | None, xattrs: Mapping[str, bytes]) -> bytes:
    target = node.target if link is None else link
    kind = TYPES[stat.S_IFMT(node.mode)] if link is None else tarfile.LNKTYPE
    sparse = node.extents if kind == tarfile.REGTYPE else None
    size = 0 if kind != tarfile.REGTYPE else node.size if sparse is None else sum(one.length for one in sparse)
    records, numbers = b"", {}
    for name, number, most in (("uid", node.uid, MAX_ID), ("gid", node.gid, MAX_ID), ("size", size, MAX_SIZE)):
        numbers[name] = number if number <= most else 0
        if number > most:
            records += _record(name.encode(), b"%d" % number)
    if link is None:
        for attribute, value in sorted(xattrs.items()):
            records += _record(b"SCHILY.xattr." + os.fsencode(attribute), value)
    blocks = _extra(b"x", records) if records else b""
    if len(path) > MAX_FIELD_NAME:
        blocks += _extra(b"L", path + b"\0")
    if len(target) > MAX_FIELD_NAME:
        blocks += _extra(b"K", target + b"\0")
    header = tarfile.TarInfo(os.fsdecode(path[:MAX_FIELD_NAME]))
    header.type, header.linkname = kind, os.fsdecode(target[:MAX_FIELD_NAME])
    header.mode, header.mtime = stat.S_IMODE(node.mode), min(max(0, node.mtime), MAX_TIME)
    header.uid, header.gid, header.size = numbers["uid"], numbers["gid"], numbers["size"]
    header.devmajor, header.devminor = node.device
    block = header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")
    return blocks + (block if sparse is None else _with_map(block, node.size, sparse))


def _with_map(header: bytes, size: int, extents: tuple[Extent, ...]) -> bytes:
    """Return the header of a sparse file, and the blocks with the rest of its map (GNU tar manual, oldgnu_header)."""
    runs = [_field(one.start) + _field(one.length) for one in (*extents, Extent(size, 0, 0))]
    first, rest = runs[:4], runs[4:]
    block = bytearray(header)
    block[156:157] = tarfile.GNUTYPE_SPARSE
    block[386:482] = b"".join(first).ljust(96, b"\0")
    block[482] = bool(rest)
    block[483:495] = _field(size)
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    more = [b"".join(rest[at : at + 21]) for at in range(0, len(rest), 21)]
    last = len(more) - 1
    return bytes(block) + b"".join(
        part.ljust(504, b"\0") + bytes([number < last]).ljust(8, b"\0") for number, part in enumerate(more)
    )


def _field(number: int) -> bytes:
    """Return a number of twelve bytes: octal, or two's complement with the highest bit set."""
    return b"%011o\0" % number if number <= MAX_SIZE else b"\x80" + number.to_bytes(11, "big")


def _extra(kind: bytes, data: bytes) -> bytes:
    """Return an extension header for the next one, with its data."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _record(name: bytes, value: bytes) -> bytes:
    """Return a pax record, which begins with its own length."""
    rest = len(name) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, name, value)
