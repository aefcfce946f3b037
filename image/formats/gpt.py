"""A raw disk with a GUID partition table: a root file system and, if there is one, its hash tree.

Written byte by byte: no loop device, no partitioning tool, and every GUID is derived from the contents.

Sources: UEFI specification 2.10, chapter 5 (GPT); the UAPI group's Discoverable Partitions Specification (types, flags,
and which GUIDs partitions under dm-verity have).
"""

from __future__ import annotations

import binascii
import hashlib
import shutil
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from uuid import UUID

from caisson.image.errors import ImageError

SECTOR = 512

#: Partitions start at multiples of this, in bytes.
ALIGNMENT = 1 << 20

#: The whole disk is a multiple of this, so that a host may open it with O_DIRECT.
_GRAIN = 4096

_ENTRIES = 128
_ENTRY = struct.Struct("<16s16sQQQ72s")
_HEADER = struct.Struct("<8sIIIIQQQQ16sQIII")
_TABLE_SECTORS = _ENTRIES * _ENTRY.size // SECTOR
_READ_ONLY = 1 << 60

#: Types of root partitions, and of the hash trees that protect them, by Debian's name of the architecture.
ROOT = {
    "amd64": UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709"),
    "arm64": UUID("b921b045-1df0-41c3-af44-4c6f280d3fae"),
}
ROOT_VERITY = {
    "amd64": UUID("2c7357ed-ebd2-46d9-aec1-23d437ec2bf5"),
    "arm64": UUID("df3300ce-d69f-4c92-978c-9bfb0f38d820"),
}


@dataclass(frozen=True)
class Partition:
    """A partition as large as its contents; ``guid`` is derived from them by default."""

    type: UUID
    name: str
    content: Path
    guid: UUID | None = None
    read_only: bool = True


def verity_guids(root_hash: bytes) -> tuple[UUID, UUID]:
    """Return the GUIDs by which systemd finds a root partition and its hash tree: the two halves of the root hash."""
    return UUID(bytes=root_hash[:16]), UUID(bytes=root_hash[-16:])


def write_disk(target: Path, partitions: Sequence[Partition]) -> None:
    """Write the disk, as large as its partitions and the two tables require.

    Raises ImageError for contents that are not whole sectors, or a name that is too long.
    """
    place = ALIGNMENT // SECTOR
    entries = bytearray()
    starts = []
    identity = hashlib.sha256(b"disk")
    end = place
    for number, partition in enumerate(partitions):
        size = partition.content.stat().st_size
        name = partition.name.encode("utf-16-le")
        if size == 0 or size % SECTOR:
            raise ImageError(f"{partition.content} cannot be a partition: {size} bytes are not whole sectors")
        if len(name) > 72:
            raise ImageError(f"partition {partition.name!r}: its name is longer than 36 characters")
        with partition.content.open("rb") as stream:
            digest = hashlib.file_digest(stream, "sha256").digest()
        identity.update(digest)
        guid = partition.guid or _guid(b"partition %d" % number + digest)
        end = place + size // SECTOR
        flags = _READ_ONLY if partition.read_only else 0
        entries += _ENTRY.pack(partition.type.bytes_le, guid.bytes_le, place, end - 1, flags, name)
        starts.append(place)
        place = -(-end * SECTOR // ALIGNMENT) * ALIGNMENT // SECTOR
    if len(partitions) > _ENTRIES:
        raise ImageError(f"partitions: a disk has {_ENTRIES} at most, not {len(partitions)}")
    table = bytes(entries).ljust(_ENTRIES * _ENTRY.size, b"\0")
    sectors = -(-(end + _TABLE_SECTORS + 1) * SECTOR // _GRAIN) * _GRAIN // SECTOR
    disk = _guid(identity.digest())
    with target.open("wb") as stream:
        stream.write(mbr([(0xEE, 1, min(sectors - 1, 0xFFFFFFFF))]))
        stream.write(_header(1, sectors - 1, 2, sectors, disk, table))
        stream.write(table)
        for start, partition in zip(starts, partitions, strict=True):
            copy_to(stream, start * SECTOR, partition.content)
        stream.seek((sectors - 1 - _TABLE_SECTORS) * SECTOR)
        stream.write(table)
        stream.write(_header(sectors - 1, 1, sectors - 1 - _TABLE_SECTORS, sectors, disk, table))


def mbr(partitions: Sequence[tuple[int, int, int]], signature: int = 0) -> bytes:
    """Encode a master boot record: up to four partitions as (type, first sector, sectors), and the disk's signature."""
    # Cylinders, heads and sectors: those that stand for "see the numbers behind".
    start, beyond = b"\x00\x02\x00", b"\xff\xff\xff"
    table = b"".join(
        struct.pack("<B3sB3sII", 0, start if first == 1 else beyond, kind, beyond, first, count)
        for kind, first, count in partitions
    )
    return bytes(440) + struct.pack("<IH", signature, 0) + table.ljust(64, b"\0") + b"\x55\xaa"


def copy_to(stream: BinaryIO, offset: int, source: Path) -> None:
    """Copy a file's contents to an offset in bytes."""
    stream.seek(offset)
    with source.open("rb") as content:
        shutil.copyfileobj(content, stream, 1 << 20)


def _header(here: int, other: int, table: int, sectors: int, disk: UUID, entries: bytes) -> bytes:
    first, last = 2 + _TABLE_SECTORS, sectors - 2 - _TABLE_SECTORS

    def packed(checksum: int) -> bytes:
        return _HEADER.pack(
            b"EFI PART", 0x10000, _HEADER.size, checksum, 0, here, other, first, last, disk.bytes_le, table,
            _ENTRIES, _ENTRY.size, binascii.crc32(entries),
        )  # fmt: skip

    return packed(binascii.crc32(packed(0))).ljust(SECTOR, b"\0")


def _guid(seed: bytes) -> UUID:
    return UUID(bytes=hashlib.sha256(seed).digest()[:16], version=4)
