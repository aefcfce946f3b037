"""A guest's root file system as a disk image: exact-sized, without root, without loop devices.

    erofs          uncompressed: the fastest to boot from, and it can be mapped from the host (DAX)
    erofs-lz4hc    about half of that, read a block at a time
    squashfs       zstd: the smallest, the slowest to make
    ext4           for hosts and kernels that have nothing else; can be mapped, too

An image depends only on its members and, except for ext4, on the version of the tool that packs it (see
image/build/tools.py): not on who builds it, where, when, or under which umask.

Device nodes are left out: the kernel mounts devtmpfs over /dev before it starts an init from a disk, and mkfs.erofs
only takes them from a tree created by root.
"""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from uuid import UUID

from caisson.image.build.tools import HOST, Tools
from caisson.image.errors import ImageError
from caisson.image.formats.ext4 import write_ext4
from caisson.image.formats.tree import Node, Tree, text
from caisson.image.run import run

#: All times in an image, in seconds since 1970.
EPOCH = 0

#: The file types in a guest's root, except devices.
KINDS = (stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)

#: zstd level for a squashfs: 19 takes 2.5 times the CPU time of 15 and saves 1 %, 12 takes half and adds 6 %.
ZSTD_LEVEL = 15


def write_filesystem(target: Path, tree: Tree, format: str, tools: Tools = HOST) -> None:
    """Write an image with one of WRITERS, replacing an existing file.

    Its UUID is derived from the members.  Meanwhile, a copy of the members is beside the target.  Raises ImageError for
    a member of another type, a missing tool, or a failure of the tool.
    """
    identity = hashlib.sha256(format.encode())
    for path, node in members(tree):
        if stat.S_IFMT(node.mode) not in KINDS:
            raise ImageError(f"{text(path)}: is not a file, directory or link (mode {node.mode:o})")
        identity.update(b"%d %o %d\n" % (len(path), node.mode, node.length) + path + node.read())
    uuid = UUID(bytes=identity.digest()[:16], version=4)
    target.unlink(missing_ok=True)
    WRITERS[format](target, tree, uuid, tools)


def members(tree: Tree) -> Iterator[tuple[bytes, Node]]:
    """Yield the members without devices, parents first and sorted."""
    return (member for member in tree.files() if not stat.S_ISCHR(member[1].mode) and not stat.S_ISBLK(member[1].mode))


def _stage(place: Path, tree: Tree) -> None:
    """Write the members as files, for tools that read a tree.  Owners and times are set by the tools."""
    directories = [(place, 0o755)]
    for path, node in members(tree):
        member = place / os.fsdecode(path)
        match stat.S_IFMT(node.mode):
            case stat.S_IFDIR:
                member.mkdir()
                directories.append((member, stat.S_IMODE(node.mode)))
            case stat.S_IFLNK:
                member.symlink_to(os.fsdecode(node.target))
            case _:
                with member.open("wb") as file:
                    file.writelines(node.contents())
                member.chmod(stat.S_IMODE(node.mode))
    for member, mode in reversed(directories):  # now that nothing more is created in them
        member.chmod(mode)


def _write_erofs(target: Path, tree: Tree, uuid: UUID, tools: Tools, *, options: Sequence[str]) -> None:
    settings = ["--quiet", "--all-root", f"-T{EPOCH}", f"-U{uuid}", "-x-1", *options]
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=target.parent) as place:
        _stage(Path(place), tree)
        run([*tools.command("mkfs.erofs"), *settings, target, place])


def _write_squashfs(target: Path, tree: Tree, uuid: UUID, tools: Tools) -> None:
    del uuid  # a squashfs has none
    with tempfile.TemporaryDirectory(prefix=".tree-", dir=target.parent) as place:
        _stage(Path(place), tree)
        run(
            [
                *tools.command("mksquashfs"), place, target, "-noappend", "-quiet", "-no-progress", "-exit-on-error",
                "-comp", "zstd", "-Xcompression-level", str(ZSTD_LEVEL), "-all-root", "-no-xattrs", "-no-exports",
                "-reproducible", "-mkfs-time", str(EPOCH), "-all-time", str(EPOCH),
            ]
        )  # fmt: skip


def _write_ext4(target: Path, tree: Tree, uuid: UUID, tools: Tools) -> None:
    del tools  # none is needed
    write_ext4(target, members(tree), uuid)


#: The writer of each of build.choices.ROOT_FORMATS.
WRITERS: dict[str, Callable[[Path, Tree, UUID, Tools], None]] = {
    # No tail packing beside inodes: only whole pages can be mapped.
    "erofs": partial(_write_erofs, options=["-Enoinline_data"]),
    "erofs-lz4hc": partial(_write_erofs, options=["-zlz4hc"]),
    "squashfs": _write_squashfs,
    "ext4": _write_ext4,
}
