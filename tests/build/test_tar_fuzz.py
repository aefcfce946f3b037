"""Fuzz layers: each is read as a tree or rejected with an error, in bounded memory.

What can be read can also be written to a disk's archive.
"""

from __future__ import annotations

import io
import random
import shutil
import subprocess
import tarfile
import tracemalloc
from functools import partial
from pathlib import Path

import pytest

from caisson.agent.client.errors import CopyError
from caisson.agent.client.unpack import ReceivedArchive, unpack
from caisson.image.containers.layers import LayerMerger
from caisson.image.errors import ImageError
from caisson.image.formats.squashfs import write_archive
from caisson.image.formats.tree import Malformed, Tree
from tests.support import fuzz

#: Bytes of Python's memory for a layer of some KB: a header of one MiB, and what is built from it.
MEMORY = 16 << 20
MAX_FILE = 1 << 30
BLOCK = 512


def dialects(directory: Path) -> list[bytes]:
    """Return archives in every dialect, with every entry type; sparse files in the formats of GNU tar and pax."""
    found = []
    for format in (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        stream = io.BytesIO()
        name = "d/" if format == tarfile.USTAR_FORMAT else f"d/{'n' * 150}"
        first = f"{name}0"
        with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
            for number, kind in enumerate(
                (tarfile.REGTYPE, tarfile.DIRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE)
            ):
                info = tarfile.TarInfo(f"{name}{number}")
                info.type, info.linkname, info.uid, info.mtime = kind, first, 1000, 5
                info.devmajor, info.devminor = 1, 3
                if format == tarfile.PAX_FORMAT:
                    info.pax_headers = {"SCHILY.xattr.user.a": "b", "mtime": "1.5", "comment": "x" * 100}
                info.size = 700 if kind == tarfile.REGTYPE else 0
                archive.addfile(info, io.BytesIO(bytes(info.size)))
            for hidden in ("d/.wh.gone", "d/.wh..wh..opq"):
                archive.addfile(tarfile.TarInfo(hidden))
        found.append(stream.getvalue())
    sparse = directory / "sparse"
    with sparse.open("wb") as file:
        file.truncate(1 << 20)
        for at in range(0, 1 << 20, 1 << 17):
            file.seek(at)
            file.write(b"x" * 4096)
    for options in (
        ["--format=gnu"],
        ["--format=pax", "--sparse-version=0.1"],
        ["--format=pax", "--sparse-version=1.0"],
    ):
        command = ["tar", "-c", "--sparse", *options, "-C", str(directory), "sparse"]
        found.append(subprocess.run(command, check=True, capture_output=True).stdout)
    return found


def with_checksum(header: bytearray) -> None:
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)


def tampered(data: bytes, chance: random.Random) -> bytes:
    """Return one to eight changes; usually the header's checksum is corrected, so that parsing continues."""
    made = bytearray(data)
    numbers = (b"0", b"7", b"\0", b" ", b"-", b"\x80", b"\xff", b"9", b"=", b"\n", b"/", b".", b"x", b"g", b"L", b"S")
    for _ in range(chance.randrange(1, 9)):
        kind = chance.random()
        block = chance.randrange(max(1, len(made) // BLOCK)) * BLOCK
        if kind < 0.5:
            at = (
                block
                + chance.choice((0, 100, 108, 116, 124, 136, 156, 157, 257, 329, 345, 386, 482))
                + chance.randrange(12)
            )
            made[at : at + 1] = chance.choice(numbers)
        elif kind < 0.7:
            at = chance.randrange(len(made))
            made[at : at + 4] = chance.randbytes(4)
        elif kind < 0.8:
            made[block + 124 : block + 136] = b"\x80" + bytes(3) + chance.randbytes(8)  # base-256
        elif kind < 0.9:
            other = chance.randrange(len(made) // BLOCK) * BLOCK
            made[other:other] = made[block : block + BLOCK * chance.randrange(1, 4)]
        else:
            del made[chance.randrange(len(made)) :]
            if len(made) < BLOCK:
                return bytes(made)
        if len(made) >= block + BLOCK and chance.random() < 0.9:
            header = bytearray(made[block : block + BLOCK])
            with_checksum(header)
            made[block : block + BLOCK] = header
    return bytes(made)


def refuses_or_reads(data: bytes, file: Path) -> bool:
    """Return whether a layer was read; it must be rejected with an error otherwise."""
    file.write_bytes(data)
    with Tree() as tree:
        try:
            LayerMerger(tree, lambda line: None, MAX_FILE).apply(file, "layer")
            write_archive(tree, io.BytesIO())
        except (ImageError, Malformed) as error:
            assert str(error) and "\n" not in str(error)
            return False
    return True


@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT)
def test_tampered_layers_are_read_or_refused_in_words(tmp_path: Path) -> None:
    originals = dialects(tmp_path)
    file = tmp_path / "layer"
    for original in originals:
        assert refuses_or_reads(original, file)
    read, refused = 0, 0
    tracemalloc.start()
    try:
        for one in fuzz.rounds(1000):
            with one as chance:
                tracemalloc.reset_peak()
                if refuses_or_reads(tampered(chance.choice(originals), chance), file):
                    read += 1
                else:
                    refused += 1
                assert tracemalloc.get_traced_memory()[1] < MEMORY
    finally:
        tracemalloc.stop()
    print(f"{read} layers read, {refused} refused")
    assert read and refused


@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT)
def test_tampered_archives_are_unpacked_beneath_their_directory_or_refused(tmp_path: Path) -> None:
    """What `cp` makes of a container's data."""
    originals = dialects(tmp_path)[:3]  # the others are sparse, and rejected
    read, refused = 0, 0
    for number, one in enumerate(fuzz.rounds(500)):
        with one as chance:
            inside = tmp_path / str(number) / "inside"
            inside.mkdir(parents=True)
            try:
                data = io.BytesIO(tampered(chance.choice(originals), chance))
                unpack(ReceivedArchive(partial(data.read, 1000)), inside, "d", "d")
                read += 1
            except (CopyError, OSError, tarfile.TarError):
                refused += 1
            assert [path.name for path in inside.parent.iterdir()] == ["inside"]
            assert {path.name for path in inside.iterdir()} <= {"d"}
            assert not [path for path in inside.rglob("*") if path.lstat().st_mode & 0o6000]
            shutil.rmtree(inside.parent)
    print(f"{read} archives unpacked, {refused} refused")
    assert read and refused
