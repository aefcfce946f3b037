"""List what a definition chooses from: root formats, compressions, distributions.

Only data: reading a definition does not import what builds it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class RootFormat:
    """Describe a file system for a guest's root: its kernel name (``rootfstype=``), whether guests can map it (DAX)."""

    kernel_name: str
    dax: bool


#: File systems on a disk; image/formats/disk.py says what each is for.
ROOT_FORMATS = {
    "erofs": RootFormat("erofs", dax=True),
    "erofs-lz4hc": RootFormat("erofs", dax=False),
    "squashfs": RootFormat("squashfs", dax=False),
    "ext4": RootFormat("ext4", dax=True),
}

#: How an initrd may be packed, and the command that does it from stdin to stdout.
COMPRESSORS: dict[str, list[str]] = {
    "none": [],
    "gzip": ["gzip", "-9", "-n"],
    "lz4": ["lz4", "-l", "-9", "-c"],
    "zstd": ["zstd", "-19", "-T0", "-q", "-c"],
}


@dataclass(frozen=True)
class Distribution:
    """Describe the layout of a distribution's C library.

    ``libraries`` is the directory of the C library in a tree, with {triplet} in it, and ``loader`` the pattern of the
    program loader's name there.  ``wheels`` are pip's platforms, with {machine} in them.  ``kernel_sources``: whether
    it has packages with a kernel's source.
    """

    libraries: str
    loader: str
    wheels: tuple[str, ...]
    kernel_sources: bool


_GLIBC = ("manylinux2014_{machine}", *(f"manylinux_2_{minor}_{{machine}}" for minor in (17, 24, 27, 28, 34, 36)))
_MUSL = ("musllinux_1_1_{machine}", "musllinux_1_2_{machine}")

#: image/packages/distribution.py says where packages come from.
DISTRIBUTIONS = {
    "debian": Distribution("usr/lib/{triplet}", "ld-linux-*.so.*", _GLIBC, kernel_sources=True),
    "ubuntu": Distribution("usr/lib/{triplet}", "ld-linux-*.so.*", _GLIBC, kernel_sources=True),
    "alpine": Distribution("usr/lib", "ld-musl-*.so.1", _MUSL, kernel_sources=False),
}
