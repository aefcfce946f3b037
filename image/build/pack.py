"""Pack a guest's root: from the layers of a build to one file that a kernel can mount, within its limits."""

from __future__ import annotations

import hashlib
import heapq
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caisson.image.build.choices import ROOT_FORMATS
from caisson.image.build.definition import Definition
from caisson.image.build.tools import Tools
from caisson.image.errors import ImageError
from caisson.image.formats import dax, disk, gpt, initrd, verity
from caisson.image.formats.scan import merge_directories
from caisson.image.formats.tree import Tree, text
from caisson.image.kernel.kernel import Kernel

#: What a kernel must have built in to mount a root of a format from a disk, without loading modules first.
BUILT_IN = {
    "erofs": ("CONFIG_EROFS_FS",),
    "erofs-lz4hc": ("CONFIG_EROFS_FS", "CONFIG_EROFS_FS_ZIP"),
    "squashfs": ("CONFIG_SQUASHFS", "CONFIG_SQUASHFS_ZSTD"),
    "ext4": ("CONFIG_EXT4_FS",),
}
DISK = ("CONFIG_VIRTIO_PCI", "CONFIG_VIRTIO_BLK")
PARTITIONS = {"plain": (), "gpt": ("CONFIG_EFI_PARTITION",), "dax": ("CONFIG_MSDOS_PARTITION",)}
VERITY = ("CONFIG_DM_VERITY", "CONFIG_DM_INIT", "CONFIG_CRYPTO_SHA256")

#: An initrd is unpacked into a ramfs, not into a tmpfs: nobody writes to it later, so tmpfs's extra features (limits,
#: swapping, extended attributes) are useless, and cost 4 % of a boot that unpacks 45 MB under emulation. Source:
#: Documentation/filesystems/ramfs-rootfs-initramfs.rst.
INITRD_ROOT = "rootfstype=ramfs"

#: Number of largest files to name when a limit is exceeded.
MAX_LARGEST_FILES = 10


class TooLarge(ImageError):
    """A limit of the definition is exceeded; the text names the largest files."""


def check_kernel(definition: Definition, kernel: Kernel) -> None:
    """Check that the kernel can mount the root of the definition.  Raises ImageError."""
    if definition.format == "initrd":
        return
    wanted = [
        *DISK,
        *BUILT_IN[definition.format],
        *PARTITIONS[definition.layout],
        *(VERITY if definition.verity else ()),
    ]
    config = kernel.config()
    lacking = [symbol for symbol in wanted if config.get(symbol) != "y"]
    if lacking:
        raise ImageError(
            f"format={definition.format}{' with verity' if definition.verity else ''}: needs a kernel with "
            f"{', '.join(lacking)} built in, and {kernel.release} has them as modules or not at all; compile one "
            "(--template lean, or kernel.source), or choose --set format=initrd"
        )


def root(definition: Definition, trees: Sequence[Path], kernel: Kernel, target: Path, tools: Tools) -> dict[str, Any]:
    """Pack the merged trees into ``target``; returns its entry in the manifest.

    Raises TooLarge, and ImageError if a tool fails.
    """
    with merge_directories(trees, initrd.CONSOLE) as tree:
        _check_limit(definition, "tree", sum(node.length for _, node in tree.files()), tree)
        if definition.format == "initrd":
            entry = _initrd(definition, tree, target)
        else:
            entry = _disk(definition, tree, target, tools)
        file = target / entry["file"]
        _check_limit(definition, "image", file.stat().st_size, tree)
    if (kernel.directory / "bzImage").is_file():
        _check_limit(definition, "kernel", (kernel.directory / "bzImage").stat().st_size)
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return entry | {"format": definition.format, "bytes": file.stat().st_size, "sha256": digest}


def _initrd(definition: Definition, tree: Tree, target: Path) -> dict[str, Any]:
    archive = io.BytesIO()
    initrd.write_cpio(archive, tree)
    (target / "initrd.img").write_bytes(initrd.pack(archive.getvalue(), definition.compression))
    return {"file": "initrd.img", "compression": definition.compression, "cmdline": [INITRD_ROOT]}


def _disk(definition: Definition, tree: Tree, target: Path, tools: Tools) -> dict[str, Any]:
    """Write a disk in the definition's layout.  ``cmdline`` is what the kernel needs to mount it."""
    filesystem, image = target / "root.filesystem", target / "root.img"
    disk.write_filesystem(filesystem, tree, definition.format, tools=tools)
    entry: dict[str, Any] = {"file": image.name, "layout": definition.layout}
    data, hashes = "/dev/vda" if definition.layout == "plain" else "/dev/vda1", None
    mount = f"root={data} ro"
    hashed = None
    if definition.verity:
        if definition.layout == "gpt":
            hashed, hashes = verity.hash_tree(filesystem), "/dev/vda2"
        else:
            hashed = verity.append(filesystem)
        # Nothing of a tampered root may run: not even its intact parts.
        mount = hashed.command_line(data, hashes, on_corruption="panic")
        entry["verity"] = hashed.record()
    if definition.layout == "plain":
        filesystem.rename(image)
    elif definition.layout == "dax":
        dax.write_dax(image, filesystem)
    else:
        _write_gpt(definition, filesystem, hashed, image)
    filesystem.unlink(missing_ok=True)
    kind = ROOT_FORMATS[definition.format].kernel_name
    return entry | {"cmdline": [mount, f"rootfstype={kind}", "init=/init"]}


def _write_gpt(definition: Definition, filesystem: Path, tree: verity.HashTree | None, image: Path) -> None:
    root_type, verity_type = gpt.ROOT[definition.arch], gpt.ROOT_VERITY[definition.arch]
    if tree is None:
        gpt.write_disk(image, [gpt.Partition(root_type, "root", filesystem)])
        return
    stored = image.with_suffix(".hashes")
    stored.write_bytes(tree.stored)
    root_guid, verity_guid = gpt.verity_guids(tree.root_hash)
    parts = [
        gpt.Partition(root_type, "root", filesystem, root_guid),
        gpt.Partition(verity_type, "root-verity", stored, verity_guid),
    ]
    gpt.write_disk(image, parts)
    stored.unlink()


def _check_limit(definition: Definition, name: str, size: int, tree: Tree | None = None) -> None:
    limit = definition.limits.bytes_of(name)
    if limit is None or size <= limit:
        return
    largest = heapq.nlargest(MAX_LARGEST_FILES, ((node.length, path) for path, node in tree.files()) if tree else ())
    lines = [f"\n  {bytes / 1e6:7.2f} MB  {text(path)}" for bytes, path in largest]
    raise TooLarge(
        f"limits.{name} is {getattr(definition.limits, name)}, but the {name} has {size / 1e6:.2f} MB"
        + ("; the largest files are:" + "".join(lines) if lines else "")
    )
