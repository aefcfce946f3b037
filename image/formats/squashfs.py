"""A tree of layers → a read-only disk that a guest can mount, made without root by sqfstar(1), from a stream.

Not erofs: its mkfs takes owners, attributes and devices from a tree on disk that only root could make, and an archive
only since 1.7, which Debian 12 does not have.  Nothing is compressed: emulated guests pay for that at each read.
"""

from __future__ import annotations

import os
import stat
import subprocess
import tarfile
from pathlib import Path
from typing import IO

from caisson.image.containers.layers import Node, Tree, walk
from caisson.image.errors import ImageError
from caisson.image.programs import which
from caisson.image.run import KEPT, CommandFailed, MissingProgram

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

#: What the fields of a header hold (tar(5)): octal digits, and bytes of a name.
MOST_ID = 0o7777777
MOST_SIZE = 0o77777777777
LONGEST = 99

#: Times in a squashfs have 32 bits.
LAST_TIME = (1 << 32) - 1


def write_squashfs(tree: Tree, target: Path) -> None:
    """Write a disk with all of a tree; its root directory's own attributes are not kept.

    Raises ImageError: a program that is missing or fails, or a file that changes meanwhile.
    """
    program = which(PROGRAM)
    if program is None:
        raise MissingProgram(PROGRAM)
    words = [program, *OPTIONS, str(target)]
    environment = {name: value for name, value in os.environ.items() if KEPT.fullmatch(name)}
    with subprocess.Popen(
        words, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            with process.stdin as stream:
                write_archive(tree, stream)
        except BrokenPipeError:
            pass  # it says why
        except BaseException:
            process.kill()
            raise
        said = process.stdout.read().decode(errors="replace")
        if status := process.wait():
            raise CommandFailed(words, status, said)


def write_archive(tree: Tree, stream: IO[bytes]) -> None:
    """Write a tree as a tar archive, in the dialect that squashfs-tools reads without loss.

    Attributes are pax records; long names are GNU's, since of pax ones it drops what a link begins with ("/", "..").
    """
    first: dict[int, bytes] = {}  # the name under which a file's contents were written
    for path, node in walk(tree.root):
        if (there := first.get(id(node))) is not None:
            stream.write(_header(path, node, link=there))
            continue
        if not node.is_directory:
            first[id(node)] = path
        stream.write(_header(path, node))
        if node.open is not None:
            _write_contents(path, node, stream)
    stream.write(bytes(2 * tarfile.BLOCKSIZE))


def _write_contents(path: bytes, node: Node, stream: IO[bytes]) -> None:
    assert node.open is not None
    left = node.size
    try:
        with node.open() as source:
            while data := source.read(min(left, 1 << 20)):
                stream.write(data)
                left -= len(data)
    except (tarfile.TarError, EOFError) as error:
        raise ImageError(f"/{path.decode(errors='replace')}: {error}") from error
    if left:
        raise ImageError(f"/{path.decode(errors='replace')}: it is shorter than it said")
    stream.write(bytes(-node.size % tarfile.BLOCKSIZE))


def _header(path: bytes, node: Node, link: bytes | None = None) -> bytes:
    target = node.target if link is None else link
    kind = TYPES[stat.S_IFMT(node.mode)] if link is None else tarfile.LNKTYPE
    size = node.size if node.open is not None and link is None else 0
    records, numbers = b"", {}
    for name, number, most in (("uid", node.uid, MOST_ID), ("gid", node.gid, MOST_ID), ("size", size, MOST_SIZE)):
        numbers[name] = number if number <= most else 0
        if number > most:
            records += _record(name.encode(), b"%d" % number)
    if link is None:
        for attribute, value in sorted(node.xattrs.items()):
            records += _record(b"SCHILY.xattr." + os.fsencode(attribute), value)
    blocks = _extra(b"x", records) if records else b""
    if len(path) > LONGEST:
        blocks += _extra(b"L", path + b"\0")
    if len(target) > LONGEST:
        blocks += _extra(b"K", target + b"\0")
    header = tarfile.TarInfo(os.fsdecode(path[:LONGEST]))
    header.type, header.linkname = kind, os.fsdecode(target[:LONGEST])
    header.mode, header.mtime = stat.S_IMODE(node.mode), min(node.mtime, LAST_TIME)
    header.uid, header.gid, header.size = numbers["uid"], numbers["gid"], numbers["size"]
    header.devmajor, header.devminor = node.device
    return blocks + header.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _extra(kind: bytes, data: bytes) -> bytes:
    """A header that belongs to the next one, with what it carries."""
    header = tarfile.TarInfo("././@LongLink")
    header.type, header.size = kind, len(data)
    return header.tobuf(tarfile.USTAR_FORMAT) + data + bytes(-len(data) % tarfile.BLOCKSIZE)


def _record(name: bytes, value: bytes) -> bytes:
    """A pax record, which begins with its own length."""
    rest = len(name) + len(value) + 3
    length = rest + len(str(rest))
    length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, name, value)
