"""Test raw disks: what sfdisk reads, and the contents in each place."""

from __future__ import annotations

import binascii
import json
import struct
import subprocess
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

from caisson.image.errors import ImageError
from caisson.image.formats import gpt
from caisson.image.formats.gpt import Partition

MIB = 1 << 20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    file = tmp_path / "root.erofs"
    file.write_bytes(b"root" * (5 * MIB // 4 + 1024))
    return file


@pytest.fixture
def hashes(tmp_path: Path) -> Path:
    file = tmp_path / "root.hashes"
    file.write_bytes(b"hash" * 3072)
    return file


def dump(disk: Path) -> dict[str, Any]:
    said = subprocess.run(["sfdisk", "--json", disk], check=True, capture_output=True, text=True)
    assert said.stderr == ""
    table: dict[str, Any] = json.loads(said.stdout)["partitiontable"]
    return table


@pytest.mark.parametrize("arch", ["amd64", "arm64"])
def test_sfdisk_finds_nothing_wrong_and_every_partition(tmp_path: Path, root: Path, hashes: Path, arch: str) -> None:
    disk = tmp_path / "disk"
    guids = gpt.verity_guids(bytes(range(32)))
    gpt.write_disk(
        disk,
        [
            Partition(gpt.ROOT[arch], "root", root, guids[0]),
            Partition(gpt.ROOT_VERITY[arch], "root-verity", hashes, guids[1]),
        ],
    )
    said = subprocess.run(["sfdisk", "--verify", disk], check=True, capture_output=True, text=True)
    assert "No errors detected" in said.stdout and said.stderr == ""
    table = dump(disk)
    assert (table["label"], table["unit"], table["sectorsize"]) == ("gpt", "sectors", 512)
    first, second = table["partitions"]
    assert (first["start"], first["size"]) == (2048, root.stat().st_size // 512)
    assert (second["start"], second["size"]) == (7 * 2048, hashes.stat().st_size // 512)
    assert (first["name"], second["name"]) == ("root", "root-verity")
    assert first["uuid"] == "00010203-0405-0607-0809-0A0B0C0D0E0F"
    assert second["uuid"] == "10111213-1415-1617-1819-1A1B1C1D1E1F"
    assert first["attrs"] == second["attrs"] == "GUID:60"
    names = {"amd64": "x86-64", "arm64": "ARM-64"}
    types = subprocess.run(["sfdisk", "-X", "gpt", "-T"], check=True, capture_output=True, text=True).stdout
    assert f"{first['type']}  Linux root ({names[arch]})" in types
    assert f"{second['type']}  Linux root verity ({names[arch]})" in types


def test_contents_are_where_the_table_says_and_nothing_is_behind_the_backup(tmp_path: Path, root: Path) -> None:
    disk = tmp_path / "disk"
    gpt.write_disk(disk, [Partition(gpt.ROOT["amd64"], "root", root)])
    data = disk.read_bytes()
    size = root.stat().st_size
    assert data[MIB : MIB + size] == root.read_bytes()
    needed = MIB + size + 33 * 512
    assert needed <= len(data) < needed + 4096 and len(data) % 4096 == 0
    assert data[-512:-504] == b"EFI PART"


def test_both_headers_carry_their_checksums_and_name_each_other(tmp_path: Path, root: Path) -> None:
    disk = tmp_path / "disk"
    gpt.write_disk(disk, [Partition(gpt.ROOT["amd64"], "root", root)])
    data = disk.read_bytes()
    last = len(data) // 512 - 1
    for here, other, table in ((1, last, 2), (last, 1, last - 32)):
        header = data[here * 512 : here * 512 + 92]
        checksum = struct.unpack_from("<I", header, 16)[0]
        assert binascii.crc32(header[:16] + bytes(4) + header[20:]) == checksum
        assert struct.unpack_from("<QQ", header, 24) == (here, other)
        assert struct.unpack_from("<Q", header, 72) == (table,)
        entries = data[table * 512 : (table + 32) * 512]
        assert struct.unpack_from("<I", header, 88) == (binascii.crc32(entries),)


def test_the_backup_table_is_enough(tmp_path: Path, root: Path) -> None:
    disk = tmp_path / "disk"
    gpt.write_disk(disk, [Partition(gpt.ROOT["amd64"], "root", root)])
    whole = dump(disk)
    with disk.open("r+b") as stream:
        stream.seek(512)
        stream.write(bytes(512))
    said = subprocess.run(["sfdisk", "--json", disk], check=True, capture_output=True, text=True)
    assert "primary" in said.stderr.lower()
    assert json.loads(said.stdout)["partitiontable"]["partitions"] == whole["partitions"]


def test_guids_follow_from_the_contents(tmp_path: Path, root: Path, hashes: Path) -> None:
    first, again, other = (tmp_path / name for name in ("first", "again", "other"))
    type_guid = gpt.ROOT["amd64"]
    gpt.write_disk(first, [Partition(type_guid, "root", root)])
    gpt.write_disk(again, [Partition(type_guid, "root", root)])
    gpt.write_disk(other, [Partition(type_guid, "root", hashes)])
    assert first.read_bytes() == again.read_bytes()
    assert dump(first)["id"] != dump(other)["id"]
    assert dump(first)["partitions"][0]["uuid"] != dump(other)["partitions"][0]["uuid"]
    twice = tmp_path / "twice"
    gpt.write_disk(twice, [Partition(type_guid, "a", root), Partition(type_guid, "b", root, read_only=False)])
    one, two = dump(twice)["partitions"]
    assert UUID(one["uuid"]) != UUID(two["uuid"])
    assert "attrs" in one and "attrs" not in two


def test_gpt_rejects_partitions_that_do_not_fit(tmp_path: Path, root: Path) -> None:
    uneven = tmp_path / "uneven"
    uneven.write_bytes(bytes(513))
    with pytest.raises(ImageError, match="513 bytes"):
        gpt.write_disk(tmp_path / "disk", [Partition(gpt.ROOT["amd64"], "root", uneven)])
    with pytest.raises(ImageError, match="36 characters"):
        gpt.write_disk(tmp_path / "disk", [Partition(gpt.ROOT["amd64"], "r" * 37, root)])
    assert not (tmp_path / "disk").exists()
