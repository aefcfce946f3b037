"""The files that an image of a container comes in, by name: in a directory or an archive, checked, uncompressed."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import lzma
import shutil
import subprocess
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from caisson.image.containers.layers import Malformed
from caisson.image.programs import which
from caisson.image.run import MissingProgram

BLOCK = 1 << 20

GZIP, XZ, BZIP2, ZSTD = b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd"


class Directory:
    """Files of an image by their names, in a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.shown = str(root)

    def has(self, name: str) -> bool:
        return (self._root / name).is_file()

    def open(self, name: str) -> IO[bytes]:
        if not self.has(name):
            raise Malformed(f"{self.shown} lacks {name}")
        return (self._root / name).open("rb")


class Archive:
    """The same, in a tar archive."""

    def __init__(self, archive: tarfile.TarFile, shown: str) -> None:
        self._archive = archive
        self.shown = shown
        self._members = {member.name.removeprefix("./"): member for member in archive if not member.isdir()}

    @classmethod
    @contextlib.contextmanager
    def of(cls, file: Path, shown: str) -> Iterator[Archive]:
        """An archive's files, while the block runs.  Raises Malformed."""
        try:
            with tarfile.open(file, mode="r:", errors="surrogateescape") as archive:
                yield cls(archive, shown)
        except tarfile.TarError as error:
            raise Malformed(f"{shown}: not a tar archive, or a damaged one: {error}") from error

    def has(self, name: str) -> bool:
        return name in self._members

    def open(self, name: str) -> IO[bytes]:
        member = self._members.get(name)
        if member is not None and member.issym():  # as older `docker save` spares itself a layer that it has had
            parent = name.rpartition("/")[0]
            member = self._members.get(_normal(f"{parent}/{member.linkname}" if parent else member.linkname))
        if member is None or not member.isfile():
            raise Malformed(f"{self.shown} lacks {name}")
        stream = self._archive.extractfile(member)
        assert stream is not None  # it is a file
        return stream


class Whole:
    """A root file system's archive: all of it is one layer, without a name."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.shown = str(file)

    def has(self, name: str) -> bool:
        return False

    def open(self, name: str = "") -> IO[bytes]:
        return self._file.open("rb")


def _normal(name: str) -> str:
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def plain(path: Path, target: Path) -> Path:
    """A file that may be compressed as one that is not: itself, or what it holds, written to another.

    Raises Malformed.
    """
    with path.open("rb") as source:
        if not source.read(6).startswith((GZIP, XZ, BZIP2, ZSTD)):
            return path
        source.seek(0)
        unpack(source, target, str(path))
    return target


def unpack(source: IO[bytes], target: Path, shown: str) -> str:
    """Write what is in a file that may be compressed; returns the SHA-256 of that."""
    magic = source.read(6)
    source.seek(0)
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] | Any = source
        if magic.startswith(GZIP):
            stream = stack.enter_context(gzip.GzipFile(fileobj=source))
        elif magic.startswith(XZ):
            stream = stack.enter_context(lzma.LZMAFile(source))
        elif magic.startswith(BZIP2):
            stream = stack.enter_context(bz2.BZ2File(source))
        elif magic.startswith(ZSTD):
            stream = stack.enter_context(_zstd(source, target.with_suffix(".zst"), shown))
        state = hashlib.sha256()
        try:
            with target.open("wb") as file:
                while data := stream.read(BLOCK):
                    state.update(data)
                    file.write(data)
        except (gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError) as error:
            raise Malformed(f"{shown}: damaged: {error}") from error
        return state.hexdigest()


@contextlib.contextmanager
def _zstd(source: IO[bytes], beside: Path, shown: str) -> Iterator[IO[bytes]]:
    """What is in a file that zstd has compressed: Python has it only from 3.14 on."""
    program = which("zstd")
    if program is None:
        raise MissingProgram("zstd")
    with beside.open("w+b") as file:  # a member of an archive is no file that a program could read
        shutil.copyfileobj(source, file, BLOCK)
        file.seek(0)
        with subprocess.Popen([program, "-dcq"], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert process.stdout is not None and process.stderr is not None
            yield process.stdout
            said = process.stderr.read().decode(errors="replace").strip()
            if process.wait():
                raise Malformed(f"{shown}: damaged: {said}")
    beside.unlink()


def sha256_of(stream: IO[bytes]) -> str:
    state = hashlib.sha256()
    while data := stream.read(BLOCK):
        state.update(data)
    return state.hexdigest()


def check(found: str, wanted: str, what: str) -> None:
    if found != wanted:
        raise Malformed(f"{what} is damaged: its SHA-256 is {found}, and was to be {wanted}")
