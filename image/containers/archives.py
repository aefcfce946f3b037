"""The files of a container image by name: in a directory or an archive, verified, decompressed, size-limited."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import hashlib
import io
import os
import stat
import subprocess
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from caisson.image.containers.tar import members
from caisson.image.formats.tree import Malformed
from caisson.image.programs import which
from caisson.image.run import MissingProgram

BLOCK = 1 << 20

GZIP, XZ, BZIP2, ZSTD = b"\x1f\x8b", b"\xfd7zXZ\0", b"BZh", b"\x28\xb5\x2f\xfd"

#: Skippable frames, which may come first: 0x184D2A50 to 0x184D2A5F (RFC 8878, section 3.1.2).
SKIPPABLE = b"\x2a\x4d\x18"

#: Decompression programs, each with a memory limit.
DECOMPRESSORS = {
    "zstd": ["zstd", "-dcq", "--memory=256MB"],
    "xz": ["xz", "-dcq", "--memlimit-decompress=256MiB"],
}

#: Maximum files in an image archive: blobs and documents.
MAX_FILES = 65_536

#: Maximum bytes of a name in an image archive: a blob's has 77.
MAX_NAME = 1024

#: Maximum links to follow from a name in an archive.
MAX_LINKS = 8


class Budget:
    """Count the bytes of an image's data.  Raises Malformed if there are more than ``most``."""

    def __init__(self, most: int, advance: Callable[[int], None] = lambda count: None) -> None:
        self.most = most
        self._left = most
        self._advance = advance

    def take(self, count: int) -> None:
        self._left -= count
        if self._left < 0:
            raise Malformed(f"the image has more than {self.most / 2**30:.1f} GiB of data; --max-size raises the limit")
        self._advance(count)


class Directory:
    """Files of an image by name, in a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.shown = str(root)

    def has(self, name: str) -> bool:
        return "\0" not in name and (self._root / name).is_file()

    def open(self, name: str) -> IO[bytes]:
        if not self.has(name):
            raise Malformed(f"{self.shown} lacks {name}")
        return (self._root / name).open("rb")


class Archive:
    """The same in a tar archive; one with more than MAX_FILES files is not an image, and appears empty."""

    def __init__(self, stream: IO[bytes], shown: str) -> None:
        self._file = stream.fileno()
        self.shown = shown
        self._members: dict[str, tuple[int, int, str]] = {}  # offset, size, target of a link
        for member in members(stream, shown, 1 << 62):
            if member.kind == stat.S_IFDIR:
                continue
            link = os.fsdecode(member.link) if member.kind != stat.S_IFREG else ""
            if member.kind == stat.S_IFLNK:  # as older `docker save` does for a repeated layer
                link = f"{os.path.dirname(os.fsdecode(member.name))}/{link}"  # noqa: PTH120 - not of this machine
            if member.extents is None and len(member.name) <= MAX_NAME and len(link) <= MAX_NAME:
                self._members[_normal(os.fsdecode(member.name))] = member.data, member.size, _normal(link)
            if len(self._members) > MAX_FILES:
                self._members = {}
                return

    @classmethod
    @contextlib.contextmanager
    def of(cls, file: Path, shown: str) -> Iterator[Archive]:
        """Open an archive for a block.  Raises Malformed."""
        with file.open("rb") as stream:
            yield cls(stream, shown)

    def has(self, name: str) -> bool:
        return name in self._members

    def misplaced(self) -> str:
        """Return advice for an archive that contains an image but is not one; empty for any other."""
        if self.has("repositories") and any(name.endswith("/layer.tar") for name in self._members):
            return "it was saved by a Docker before 1.10; load it into a newer one, and save it again"
        if self.has("config.json") and any(name.startswith("rootfs/") for name in self._members):
            return "it holds a bundle; unpack it, and name the directory"
        tops = {name.partition("/")[0] for name in self._members}
        if len(tops) == 1 and (self.has(f"{min(tops)}/oci-layout") or self.has(f"{min(tops)}/manifest.json")):
            return f"it holds one in its directory {min(tops)}; unpack it, and name that directory"
        return ""

    def open(self, name: str) -> IO[bytes]:
        member = self._members.get(name)
        for _ in range(MAX_LINKS):
            if member is None or not member[2]:
                break
            member = self._members.get(member[2])
        if member is None or member[2]:
            raise Malformed(f"{self.shown} lacks {name}")
        return io.BufferedReader(_Window(self._file, member[0], member[1]), BLOCK)


class Whole:
    """An archive of a root file system: a single layer without a name."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.shown = str(file)

    def has(self, name: str) -> bool:
        return False

    def open(self, name: str = "") -> IO[bytes]:
        return self._file.open("rb")


class _Window(io.RawIOBase):
    """A part of a file."""

    def __init__(self, file: int, begin: int, size: int) -> None:
        self._file, self._begin, self._size, self._at = file, begin, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = 0) -> int:
        self._at = max(0, offset + (0, self._at, self._size)[whence])
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: Any) -> int:
        count = os.preadv(self._file, [memoryview(buffer)[: max(0, self._size - self._at)]], self._begin + self._at)
        self._at += count
        return count


def _normal(name: str) -> str:
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            parts = parts[:-1]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def ensure_uncompressed(path: Path, target: Path, budget: Budget) -> Path:
    """Return an uncompressed file: this one, or its contents written to ``target``.  Raises Malformed."""
    with path.open("rb") as source:
        if not compression(source):
            return path
        unpack(source, target, str(path), budget)
    return target


def compression(source: IO[bytes]) -> str:
    """Return a file's compression, by its first bytes; empty if uncompressed."""
    magic = source.read(6)
    source.seek(0)
    if magic.startswith(ZSTD) or (magic[1:4] == SKIPPABLE and magic[0] & 0xF0 == 0x50):
        return "zstd"
    return next((kind for kind, begin in (("gzip", GZIP), ("xz", XZ), ("bzip2", BZIP2)) if magic.startswith(begin)), "")


def unpack(source: IO[bytes], target: Path, shown: str, budget: Budget) -> str:
    """Write a file's contents, uncompressed; returns their SHA-256.  Raises Malformed."""
    kind = compression(source)
    with contextlib.ExitStack() as stack:
        stream: IO[bytes] | Any = source
        if kind == "gzip":
            stream = stack.enter_context(gzip.GzipFile(fileobj=source))
        elif kind == "bzip2":
            stream = stack.enter_context(bz2.BZ2File(source))
        elif kind:
            stream = stack.enter_context(_decompressed(kind, source, target.with_suffix(".compressed"), shown))
        state = hashlib.sha256()
        try:
            with target.open("wb") as file:
                while data := stream.read(BLOCK):
                    budget.take(len(data))
                    state.update(data)
                    file.write(data)
        except (gzip.BadGzipFile, zlib.error, EOFError, ValueError) as error:
            raise Malformed(f"{shown}: damaged: {error}") from error
        except OSError as error:
            if error.errno is None:  # what bz2 says of bad data
                raise Malformed(f"{shown}: damaged: {error}") from error
            raise
        return state.hexdigest()


@contextlib.contextmanager
def _decompressed(kind: str, source: IO[bytes], beside: Path, shown: str) -> Iterator[IO[bytes]]:
    """Decompress with an external program: Python has zstd only from 3.14 on, and its lzma uses unbounded memory."""
    words = DECOMPRESSORS[kind]
    program = which(words[0])
    if program is None:
        raise MissingProgram(words[0])
    with beside.open("w+b") as file:  # a program could not read a member of an archive
        while data := source.read(BLOCK):
            file.write(data)
        file.seek(0)
        with subprocess.Popen(
            [program, *words[1:]], stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        ) as process:
            assert process.stdout is not None and process.stderr is not None
            try:
                yield process.stdout
            except BaseException:
                process.kill()
                raise
            said = process.stderr.read(4096).decode(errors="replace").strip()
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
        raise Malformed(f"{what} is damaged: its SHA-256 is {found}, not {wanted}")
