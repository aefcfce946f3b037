"""Test extracting the ELF kernel from a bzImage, and rejecting other files."""

from __future__ import annotations

import bz2
import lzma
import struct
import subprocess
import zlib
from collections.abc import Callable

import pytest

from caisson.image.kernel import bzimage


def elf(note_type: int = bzimage.PVH_ENTRY) -> bytes:
    note = struct.pack("<III", 4, 4, note_type) + b"Xen\0" + struct.pack("<I", 0x1000000)
    header = struct.pack("<4sBBBB8xHHIQQQIHHHHHH", b"\x7fELF", 2, 1, 1, 0, 2, 62, 1, 0, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    program = struct.pack("<IIQQQQQQ", bzimage.PT_NOTE, 4, 120, 0, 0, len(note), len(note), 4)
    return header + program + note + bytes(5000)


def bz_image(payload: bytes, size: int) -> bytes:
    head = bytearray(1024)
    head[0x1F1] = 1
    head[0x202:0x206] = b"HdrS"
    struct.pack_into("<H", head, 0x206, 0x20F)
    struct.pack_into("<II", head, 0x248, 16, len(payload) + 4)
    return bytes(head) + bytes(16) + payload + struct.pack("<I", size)


def by_tool(*command: str) -> Callable[[bytes], bytes]:
    return lambda data: subprocess.run(command, input=data, capture_output=True, check=True).stdout


COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "gzip": lambda data: zlib.compress(data, wbits=31),
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, format=lzma.FORMAT_ALONE),
    "bzip2": bz2.compress,
    "zstd": by_tool("zstd", "-q", "-c"),
}


@pytest.mark.parametrize("compress", COMPRESSORS.values(), ids=COMPRESSORS)
def test_the_kernel_comes_out_as_it_went_in(compress: Callable[[bytes], bytes]) -> None:
    kernel = elf()
    assert bzimage.extract(bz_image(compress(kernel), len(kernel))) == kernel


@pytest.mark.parametrize(
    ("image", "reason"),
    [
        (b"", "not a bzImage"),
        (elf(), "not a bzImage"),
        (bz_image(zlib.compress(elf(), wbits=31), len(elf()))[:-100], "cut short"),
        (bz_image(zlib.compress(elf(), wbits=31), len(elf()) + 1), "damaged"),
        (bz_image(b"\x1f\x8b" + bytes(100), 100), "damaged"),
        (bz_image(b"what is this", 12), "not known"),
        (bz_image(zlib.compress(elf(note_type=5), wbits=31), len(elf())), "CONFIG_PVH"),
        (bz_image(zlib.compress(b"not an ELF" * 9, wbits=31), 90), "CONFIG_PVH"),
    ],
)
def test_bzimage_rejects_unusable_kernels_with_the_reason(image: bytes, reason: str) -> None:
    with pytest.raises(bzimage.NotUsable, match=reason):
        bzimage.extract(image)
