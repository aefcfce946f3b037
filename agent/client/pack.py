"""Pack a file or a directory of the host into a tar archive, in large pieces."""

from __future__ import annotations

import os
import stat
import tarfile
from collections.abc import Callable
from pathlib import Path

from caisson.agent.client.caller import INPUT_CHUNK
from caisson.agent.client.errors import CopyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from io import FileIO

#: The name of what is packed in its archive.
NAME = "x"

#: Maximum size of a file that claims to be empty: those in /proc and /sys are read to their end.
MAX_UNSIZED = 64 << 20

FILE_TYPES = {
    stat.S_IFREG: tarfile.REGTYPE,
    stat.S_IFDIR: tarfile.DIRTYPE,
    stat.S_IFLNK: tarfile.SYMTYPE,
    stat.S_IFIFO: tarfile.FIFOTYPE,
}


class Pieces:
    """Collect what is written into pieces of INPUT_CHUNK bytes; ``send`` gets each, and may use it until it returns."""

    def __init__(self, send: Callable[[memoryview], object]) -> None:
        self._send = send
        self._buffer = memoryview(bytearray(INPUT_CHUNK))
        self._used = 0
        self.total = 0

    def write(self, data: bytes) -> None:
        """Add data."""
        left = memoryview(data)
        while left:
            room = self._buffer[self._used : self._used + len(left)]
            room[:] = left[: len(room)]
            left = left[len(room) :]
            self._add(len(room))

    def write_from(self, file: FileIO, size: int) -> int:
        """Read data from an unbuffered file into the piece; returns how much there was, at most ``size``."""
        left = size
        while left and (count := file.readinto(self._buffer[self._used : self._used + left])):
            left -= count
            self._add(count)
        return size - left

    def _add(self, count: int) -> None:
        self._used += count
        self.total += count
        if self._used == len(self._buffer):
            self.flush()

    def flush(self) -> None:
        """Send an incomplete piece."""
        if self._used:
            used, self._used = self._used, 0
            self._send(self._buffer[:used])


def pack(source: Path, pieces: Pieces) -> list[str]:
    """Write an archive of a file or a directory, which is called NAME in it.

    Everything belongs to root.  Returns the names of files left out: sockets and devices.  Raises CopyError, OSError.
    """
    left_out: list[str] = []
    packed: dict[tuple[int, int], str] = {}  # files with several links, by inode
    ways = [(source, NAME)]
    while ways:
        path, name = ways.pop()
        state = path.lstat()
        if kind := uncopyable_type(state.st_mode):
            left_out.append(f"{path}: a {kind}")
            continue
        member = tarfile.TarInfo(name)
        member.type = FILE_TYPES[stat.S_IFMT(state.st_mode)]
        member.mode = stat.S_IMODE(state.st_mode)
        member.mtime = max(0, int(state.st_mtime))
        if stat.S_ISDIR(state.st_mode):
            ways += [(inner, f"{name}/{inner.name}") for inner in sorted(path.iterdir(), reverse=True)]
        elif stat.S_ISLNK(state.st_mode):
            member.linkname = str(path.readlink())
        elif state.st_nlink > 1 and (first := packed.setdefault((state.st_dev, state.st_ino), name)) != name:
            member.type, member.linkname = tarfile.LNKTYPE, first
        if member.isreg():
            _pack_file(member, path, pieces)
        else:
            pieces.write(_header(member))
    pieces.write(bytes(2 * tarfile.BLOCKSIZE))
    pieces.write(bytes(-pieces.total % tarfile.RECORDSIZE))
    pieces.flush()
    return left_out


def uncopyable_type(mode: int) -> str | None:
    """Return the type of a file that cannot be copied."""
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None


def _header(member: tarfile.TarInfo) -> bytes:
    # GNU format: the only one for long names that busybox understands.
    return member.tobuf(tarfile.GNU_FORMAT, "utf-8", "surrogateescape")


def _pack_file(member: tarfile.TarInfo, path: Path, pieces: Pieces) -> None:
    with path.open("rb", buffering=0) as file:
        state = os.fstat(file.fileno())
        member.size = state.st_size
        if state.st_blocks == 0 and member.size <= os.sysconf("SC_PAGE_SIZE"):
            data = _read_unsized(file)
            member.size = len(data)
            pieces.write(_header(member) + data)
        else:
            pieces.write(_header(member))
            if pieces.write_from(file, member.size) < member.size:
                raise CopyError(f"{path}: became shorter while it was copied; try again")
    pieces.write(bytes(-member.size % tarfile.BLOCKSIZE))


def _read_unsized(file: FileIO) -> bytes:
    data = bytearray()
    while len(data) < MAX_UNSIZED and (more := file.read(MAX_UNSIZED - len(data))):
        data += more
    return bytes(data)
