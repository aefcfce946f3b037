"""Test Kata's layout of a disk that is also persistent memory: its contents, and what the kernel checks."""

from __future__ import annotations

import json
import struct
import subprocess
from pathlib import Path

import pytest

from caisson.image.errors import ImageError
from caisson.image.formats import dax

MIB = 1 << 20


@pytest.fixture
def filesystem(tmp_path: Path) -> Path:
    file = tmp_path / "root.ext4"
    file.write_bytes(b"rootroot" * (5 * MIB // 8 + 512))
    return file


def partition(disk: Path) -> dict[str, int | str]:
    said = subprocess.run(["sfdisk", "--json", disk], check=True, capture_output=True, text=True)
    table = json.loads(said.stdout)["partitiontable"]
    assert table["label"] == "dos"
    (only,) = table["partitions"]
    return {key: only[key] for key in ("start", "size", "type")}


def test_both_boot_records_lead_to_the_same_root(tmp_path: Path, filesystem: Path) -> None:
    image, behind = tmp_path / "image", tmp_path / "behind"
    dax.write_dax(image, filesystem)
    data = image.read_bytes()
    behind.write_bytes(data[2 * MIB :])  # what the guest sees as /dev/pmem0
    size = filesystem.stat().st_size
    assert partition(image) == {"start": 3 * MIB // 512, "size": size // 512, "type": "83"}
    assert partition(behind) == {"start": MIB // 512, "size": size // 512, "type": "83"}
    assert data[3 * MIB : 3 * MIB + size] == filesystem.read_bytes()
    assert data[3 * MIB + size :].strip(b"\0") == b""
    assert data[512:4096].strip(b"\0") == data[8192 : 2 * MIB].strip(b"\0") == b""


def test_the_info_block_says_what_the_driver_checks(tmp_path: Path, filesystem: Path) -> None:
    image = tmp_path / "image"
    dax.write_dax(image, filesystem)
    block = image.read_bytes()[4096:8192]
    assert block[:16] == b"NVDIMM_PFN_INFO\0"
    assert block[16:32] != bytes(16)
    assert block[32:48] == bytes(16)
    flags, major, minor, offset, pages, mode = struct.unpack_from("<IHHQQI", block, 48)
    assert (flags, major, minor, offset, mode) == (0, 1, 4, 2 * MIB, 1)
    assert pages == (image.stat().st_size - 2 * MIB) // 4096
    assert struct.unpack_from("<IIIIH", block, 76) == (0, 0, 2 * MIB, 4096, 64)
    assert block[94:4088] == bytes(3994)
    # The kernel's checksum of the block, with the checksum field set to zero.
    words = struct.unpack("<1024I", block[:4088] + bytes(8))
    low = sum(words) % 2**32
    high = sum((1024 - at) * word for at, word in enumerate(words)) % 2**32
    assert struct.unpack_from("<Q", block, 4088) == (high << 32 | low,)


def test_a_checksum_known_from_elsewhere() -> None:
    assert dax.fletcher64(struct.pack("<3I", 1, 2, 3)) == (1 + 3 + 6) << 32 | 6
    assert dax.fletcher64(struct.pack("<2I", 0xFFFFFFFF, 2)) == 0 << 32 | 1


@pytest.mark.parametrize("grain", [dax.GRAIN, dax.GRAIN_BEFORE_5_3])
def test_the_namespace_ends_where_memory_can_be_mapped(tmp_path: Path, filesystem: Path, grain: int) -> None:
    image = tmp_path / "image"
    dax.write_dax(image, filesystem, grain=grain)
    size = image.stat().st_size
    assert size % grain == 0
    assert 0 <= size - (3 * MIB + filesystem.stat().st_size) < grain


def test_the_same_file_system_gives_the_same_bytes(tmp_path: Path, filesystem: Path) -> None:
    for name in ("first", "second"):
        dax.write_dax(tmp_path / name, filesystem)
    assert (tmp_path / "first").read_bytes() == (tmp_path / "second").read_bytes()


def test_half_a_sector_is_refused(tmp_path: Path) -> None:
    uneven = tmp_path / "uneven"
    uneven.write_bytes(bytes(700))
    with pytest.raises(ImageError, match="700 bytes"):
        dax.write_dax(tmp_path / "image", uneven)
    assert not (tmp_path / "image").exists()
