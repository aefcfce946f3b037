"""A guest's root file system as a disk image: exact-sized, without root, without loop devices.

    erofs          uncompressed: the fastest to boot from, and it can be mapped from the host (DAX)
    erofs-lz4hc    about half of that, read a block at a time
    squashfs       zstd: the smallest, the slowest to make
    ext4           for hosts and kernels that have nothing else; can be mapped, too

What is in an image follows from its members alone, and, but for ext4, from the version of the tool that packs it (see
image/build/tools.py): not from who builds, where, when, or under which umask.

Device nodes are left out: the kernel mounts devtmpfs over /dev before it starts an init from a disk, and mkfs.erofs can
only take them from a tree that root made.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from uuid import UUID

from caisson.image.build.tools import HOST, Tools
from caisson.image.errors import ImageError
from caisson.image.formats.ext4 import write_ext4
from caisson.image.formats.initrd import Entry
from caisson.image.run import run

#: All times in an image, in seconds since 1970.
EPOCH = 0

#: How hard zstd tries for a squashfs: 19 takes 2.5 times the CPU time of 15 and saves 1 %, 12 takes half and adds 6 %.
ZSTD_LEVEL = 15


@dataclass(frozen=True)
class Format:
    """A kind of root file system: what the kernel calls it (``rootfstype=``), whether guests can map it (``dax``)."""

    kernel_name: str
    dax: bool
    write: Callable[[Path, Sequence[Entry], UUID, Tools], None]


def write_filesystem(target: Path, entries: Iterable[Entry], format: str, tools: Tools = HOST) -> None:
    """Write an image of one of FORMATS; a file that is there already is replaced.

    Directories that have members and are none themselves are made (root's, 0755).  Its UUID follows from the members.
    While it is made, a copy of the members is beside the target.
    Raises ImageError: for members that contradict each other, a missing tool, or what that tool complains of.
    """
    members = _checked(entries)
    identity = hashlib.sha256(format.encode())
    for entry in members:
        name = os.fsencode(entry.path)
        identity.update(b"%d %o %d\n" % (len(name), entry.mode, len(entry.data)) + name + entry.data)
    uuid = UUID(bytes=identity.digest()[:16], version=4)
    target.unlink(missing_ok=True)
    FORMATS[format].write(target, members, uuid, tools)


def _checked(entries: Iterable[Entry]) -> list[Entry]:
    """The members without devices, and with all directories, parents first and sorted."""
    members = {entry.path: entry for entry in entries if not stat.S_ISCHR(entry.mode) and not stat.S_ISBLK(entry.mode)}
    for path in list(members):
        parts = path.split("/")
        if any(part in ("", ".", "..") for part in parts):
            raise ImageError(f"{path!r} is no path inside an image")
        for depth in range(1, len(parts)):
            above = "/".join(parts[:depth])
            if not stat.S_ISDIR(members.setdefault(above, Entry(above, stat.S_IFDIR | 0o755)).mode):
                raise ImageError(f"{path} cannot be in an image: {above} is no directory there")
    return [members[path] for path in sorted(members, key=lambda path: path.split("/"))]


def _stage(tree: Path, entries: Sequence[Entry]) -> None:
    """The members as files, for tools that read a tree.  Owners and times are the tools' affair."""
    for entry in entries:
        path = tree / entry.path
        match stat.S_IFMT(entry.mode):
            case stat.S_IFDIR:
                path.mkdir()
            case stat.S_IFLNK:
                path.symlink_to(os.fsdecode(entry.data))
            case stat.S_IFREG:
                path.write_bytes(entry.data)
                path.chmod(stat.S_IMODE(entry.mode))
            case _:
                raise ImageError(f"{entry.path} is no file, directory or link (mode {entry.mode:o})")
    for entry in reversed(entries):  # now that nothing more has to be made in them
        if stat.S_ISDIR(entry.mode):
            (tree / entry.path).chmod(stat.S_IMODE(entry.mode))
    tree.chmod(0o755)


def _write_erofs(target: Path, entries: Sequence[Entry], uuid: UUID, tools: Tools, *, options: Sequence[str]) -> None:
    settings = ["--quiet", "--all-root", f"-T{EPOCH}", f"-U{uuid}", "-x-1", *options]
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=target.parent) as place:
        _stage(Path(place), entries)
        run([*tools.command("mkfs.erofs"), *settings, target, place])


def _write_squashfs(target: Path, entries: Sequence[Entry], uuid: UUID, tools: Tools) -> None:
    del uuid  # a squashfs has none
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=target.parent) as place:
        _stage(Path(place), entries)
        run(
            [
                *tools.command("mksquashfs"), place, target, "-noappend", "-quiet", "-no-progress", "-exit-on-error",
                "-comp", "zstd", "-Xcompression-level", str(ZSTD_LEVEL), "-all-root", "-no-xattrs", "-no-exports",
                "-reproducible", "-mkfs-time", str(EPOCH), "-all-time", str(EPOCH),
            ]
        )  # fmt: skip


def _write_ext4(target: Path, entries: Sequence[Entry], uuid: UUID, tools: Tools) -> None:
    del tools  # none is needed
    write_ext4(target, entries, uuid)


#: What a definition can ask for.
FORMATS = {
    # Tails of files are not put beside their inodes: only whole pages can be mapped.
    "erofs": Format("erofs", True, partial(_write_erofs, options=["-Enoinline_data"])),
    "erofs-lz4hc": Format("erofs", False, partial(_write_erofs, options=["-zlz4hc"])),
    "squashfs": Format("squashfs", False, _write_squashfs),
    "ext4": Format("ext4", True, _write_ext4),
}
