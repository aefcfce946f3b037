"""The layout of Kata's images: a root disk that a host may also map into the guest as persistent memory.

    0        MBR #1: the root partition at 3 MiB, for whoever takes the file for a disk
    4 KiB    an nd_pfn info block: "the namespace's data starts at 2 MiB", for the guest's nvdimm driver
    2 MiB    MBR #2: the root partition 1 MiB further on; all that the driver shows as /dev/pmem0 starts here
    3 MiB    the root file system

Pages of an uncompressed file system are then the host's (DAX), shared by all guests of the image.

Sources: Linux drivers/nvdimm/pfn.h (the block), pfn_devs.c nd_pfn_validate (what of it is checked), core.c (the
checksum); the diagram in osbuilder's image_builder.sh.
"""

from __future__ import annotations

import hashlib
import struct
from pathlib import Path

from caisson.image.errors import ImageError
from caisson.image.formats.gpt import SECTOR, copy_to, mbr

MIB = 1 << 20

#: Where the info block is, and how large.
INFO_OFFSET = 4096
INFO_SIZE = 4096

#: Where the namespace's data starts: at a huge page.
DATA_OFFSET = 2 * MIB

#: Where the root file system starts, from the start of the file and from that of /dev/pmem0.
ROOT_OFFSET = 3 * MIB
_ROOT_IN_DATA = ROOT_OFFSET - DATA_OFFSET

#: Linux takes a namespace whose ends are at 2 MiB; before 5.3, one whose ends are at 128 MiB.
GRAIN = 2 * MIB
GRAIN_BEFORE_5_3 = 128 * MIB

#: signature, uuid, parent uuid, flags, version, data offset, pages, mode, start pad, end trunc, alignment, page size,
#: size of a struct page
_INFO = struct.Struct("<16s16s16sIHHQQIIIIIH")
_LINUX = 0x83
_PAGE = 4096
_MODE_RAM = 1  # struct pages in the guest's memory, where there is room, and not in the file, which is read-only


def write_dax(target: Path, filesystem: Path, *, grain: int = GRAIN) -> None:
    """Write the image around a file system; the file is a multiple of ``grain`` bytes.

    Raises ImageError if the file system is empty or not whole sectors.
    """
    size = filesystem.stat().st_size
    if size == 0 or size % SECTOR:
        raise ImageError(f"{filesystem} cannot be a partition: its {size} bytes are not whole {SECTOR}-byte sectors")
    with filesystem.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").digest()
    total = -(-(ROOT_OFFSET + size) // grain) * grain
    signature = int.from_bytes(digest[16:20], "little")
    with target.open("wb") as image:
        image.write(mbr([(_LINUX, ROOT_OFFSET // SECTOR, size // SECTOR)], signature))
        image.seek(INFO_OFFSET)
        image.write(info_block(digest[:16], (total - DATA_OFFSET) // _PAGE))
        image.seek(DATA_OFFSET)
        image.write(mbr([(_LINUX, _ROOT_IN_DATA // SECTOR, size // SECTOR)], signature))
        copy_to(image, ROOT_OFFSET, filesystem)
        image.truncate(total)


def info_block(uuid: bytes, pages: int) -> bytes:
    """Encode a struct nd_pfn_sb of version 1.4.  The parent UUID is zero: a namespace without labels has none."""
    fields = _INFO.pack(
        b"NVDIMM_PFN_INFO\0", uuid, bytes(16), 0, 1, 4, DATA_OFFSET, pages, _MODE_RAM, 0, 0, GRAIN, _PAGE, 64
    )
    block = fields.ljust(INFO_SIZE - 8, b"\0")
    return block + struct.pack("<Q", fletcher64(block + bytes(8)))


def fletcher64(data: bytes) -> int:
    """Compute the nvdimm driver's checksum: the sum of all 32-bit words, and above it the sum of all those sums."""
    low = high = 0
    for (word,) in struct.iter_unpack("<I", data):
        low = (low + word) & 0xFFFFFFFF
        high = (high + low) & 0xFFFFFFFF
    return high << 32 | low
