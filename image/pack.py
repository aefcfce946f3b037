"""Packing a guest's root: from the layers of a build to one file that a kernel can mount, within its limits."""

from __future__ import annotations

import hashlib
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from image import initrd
from image.definition import Definition
from image.errors import ImageError
from image.kernel import Kernel

#: What a kernel must have built in to mount a root of a format from a disk, with nothing to load modules before.
BUILT_IN = {
    "erofs": ("CONFIG_EROFS_FS",),
    "erofs-lz4hc": ("CONFIG_EROFS_FS", "CONFIG_EROFS_FS_ZIP"),
    "squashfs": ("CONFIG_SQUASHFS", "CONFIG_SQUASHFS_ZSTD"),
    "ext4": ("CONFIG_EXT4_FS",),
}
DISK = ("CONFIG_VIRTIO_PCI", "CONFIG_VIRTIO_BLK")
VERITY = ("CONFIG_DM_VERITY", "CONFIG_DM_INIT", "CONFIG_CRYPTO_SHA256")

#: How many of the largest files are named when a limit is exceeded.
CULPRITS = 10


class TooLarge(ImageError):
    """A limit of the definition is exceeded; the text names the largest files."""


def check_kernel(definition: Definition, kernel: Kernel) -> None:
    """Raises ImageError when the kernel could not mount the root that the definition asks for."""
    if definition.format == "initrd":
        return
    wanted = [*DISK, *BUILT_IN[definition.format], *(VERITY if definition.verity else ())]
    config = kernel.config()
    lacking = [symbol for symbol in wanted if config.get(symbol) != "y"]
    if lacking:
        raise ImageError(
            f"a root of format {definition.format}{' with verity' if definition.verity else ''} needs a kernel with "
            f"{', '.join(lacking)} built in, and {kernel.release} has them as modules or not at all; compile one "
            "(--template lean, or kernel.source), or choose --set format=initrd"
        )


def root(definition: Definition, trees: Sequence[Path], kernel: Kernel, target: Path) -> dict[str, Any]:
    """Pack the trees, laid over each other, into ``target``; returns what the manifest says of it.

    Raises TooLarge, and ImageError for a tool that fails.
    """
    entries = list(initrd.overlaid(trees, [initrd.CONSOLE]))
    _check_limit(definition, "tree", sum(len(entry.data) for entry in entries), entries)
    archive = io.BytesIO()
    initrd.write_cpio(archive, iter(entries))
    file = target / "initrd.img"
    file.write_bytes(initrd.pack(archive.getvalue(), definition.compression))
    said: dict[str, Any] = {"file": file.name, "format": definition.format, "compression": definition.compression}
    _check_limit(definition, "image", file.stat().st_size, entries)
    if (kernel.directory / "bzImage").is_file():
        _check_limit(definition, "kernel", (kernel.directory / "bzImage").stat().st_size, [])
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return said | {"bytes": file.stat().st_size, "sha256": digest}


def _check_limit(definition: Definition, name: str, size: int, entries: Sequence[initrd.Entry]) -> None:
    limit = definition.limits.bytes_of(name)
    if limit is None or size <= limit:
        return
    largest = sorted(entries, key=lambda entry: len(entry.data), reverse=True)[:CULPRITS]
    lines = [f"\n  {len(entry.data) / 1e6:7.2f} MB  /{entry.path}" for entry in largest]
    raise TooLarge(
        f"limits.{name} is {getattr(definition.limits, name)}, but the {name} has {size / 1e6:.2f} MB"
        + ("; the largest files are:" + "".join(lines) if lines else "")
    )
