"""Files that the host sends, in pieces: resolv.conf, secrets, what cannot be shared otherwise.

Containers may have write access to the directories around, so no symbolic link is followed anywhere on the way
(openat2(2), RESOLVE_NO_SYMLINKS), and a file is without a name until all of it is there (O_TMPFILE, open(2)): nobody
sees half of it, and nothing is left when the rest never comes.
"""

from __future__ import annotations

import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.base.errors import InvalidArgument, PathOutside, SystemCallFailed
from caisson.agent.base.record import Record

ROOT = "/run"
RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS

#: Files of which some pieces have come; with more the oldest is given up.
UNFINISHED = 32


class Piece(Record):
    """A piece of a file: `data` is what is at `offset` of its `size` bytes.  Modes are permission bits."""

    path: str
    size: int
    offset: int
    data: bytes
    mode: int = 0o600
    directory_mode: int = 0o700
    uid: int = 0
    gid: int = 0


class _Unfinished:
    """A file without a name yet, and which parts of it have come."""

    def __init__(self, directory: int, size: int) -> None:
        self.size = size
        self.fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
        self._parts: list[tuple[int, int]] = []  # from, to; in order, not touching

    @property
    def complete(self) -> bool:
        return not self.size or self._parts == [(0, self.size)]

    def contradicts(self, offset: int, data: bytes) -> bool:
        """Whether something else came for this place: the host has begun anew."""
        for start, end in self._parts:
            low, high = max(start, offset), min(end, offset + len(data))
            if low < high and os.pread(self.fd, high - low, low) != data[low - offset : high - offset]:
                return True
        return False

    def write(self, offset: int, data: bytes) -> None:
        view = memoryview(data)
        while view:
            view = view[os.pwrite(self.fd, view, offset + len(data) - len(view)) :]
        merged: list[tuple[int, int]] = []
        for start, end in sorted([*self._parts, (offset, offset + len(data))]):
            if merged and start <= merged[-1][1]:
                merged[-1] = merged[-1][0], max(end, merged[-1][1])
            elif end > start:
                merged.append((start, end))
        self._parts = merged

    def close(self) -> None:
        os.close(self.fd)


class Files:
    """Files on their way into the guest, all below one directory."""

    def __init__(self, root: str = ROOT) -> None:
        self._root = root
        self._unfinished: dict[str, _Unfinished] = {}
        self._count = 0

    def write(self, piece: Piece) -> None:
        """Take a piece, in any order; the file appears with the last of them, in place of what had its name.

        A piece that comes again is fine; one with other contents begins the file anew.  Raises PathOutside for a path
        elsewhere, InvalidArgument, or SystemCallFailed.
        """
        path = os.path.normpath(piece.path)  # as hosts expect: "/run/../etc" is a path elsewhere
        if not path.startswith(f"{self._root}/"):
            raise PathOutside(path=path, root=self._root)
        if "\0" in path:
            raise InvalidArgument("the path has a NUL in it")
        if piece.size < 0 or piece.offset < 0 or piece.offset + len(piece.data) > piece.size:
            raise InvalidArgument(
                f"{path}: {len(piece.data)} bytes at {piece.offset} do not fit into a file of {piece.size} bytes"
            )
        if stat.S_IFMT(piece.mode) not in (0, stat.S_IFREG):
            raise InvalidArgument(f"{path}: mode {piece.mode:#o} is not a regular file's")
        try:
            self._write(path, piece)
        except OSError as error:
            self._forget(path)
            raise SystemCallFailed(f"{path}: {os.strerror(error.errno or 0)}") from error

    def _write(self, path: str, piece: Piece) -> None:
        directory, _, name = path.removeprefix(f"{self._root}/").rpartition("/")
        directory_fd = self._open_directory(directory, piece.directory_mode & 0o777)
        try:
            unfinished = self._unfinished.get(path)
            if unfinished and (unfinished.size != piece.size or unfinished.contradicts(piece.offset, piece.data)):
                self._forget(path)
                unfinished = None
            if unfinished is None:
                unfinished = self._unfinished[path] = _Unfinished(directory_fd, piece.size)
                while len(self._unfinished) > UNFINISHED:
                    self._forget(next(iter(self._unfinished)))
            unfinished.write(piece.offset, piece.data)
            if unfinished.complete:
                os.fchown(unfinished.fd, piece.uid, piece.gid)
                os.fchmod(unfinished.fd, piece.mode & 0o777)
                self._name(unfinished.fd, directory_fd, name)
                self._forget(path)
        finally:
            os.close(directory_fd)

    def _open_directory(self, path: str, mode: int) -> int:
        """Open a directory below the root, and make what is missing of it."""
        at = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in path.split("/") if path else ():
            try:
                try:
                    os.mkdir(name, mode, dir_fd=at)
                except FileExistsError:
                    pass
                inner = syscalls.openat2(at, name, os.O_PATH | os.O_DIRECTORY, resolve=RESOLVE)
            finally:
                os.close(at)
            at = inner
        return at

    def _name(self, fd: int, directory: int, name: str) -> None:
        """Give the file its name, over whatever has it now: link(2) cannot replace, rename(2) can."""
        self._count += 1
        passing = f".caisson-copy-{os.getpid()}-{self._count}"
        os.link(f"/proc/self/fd/{fd}", passing, dst_dir_fd=directory, follow_symlinks=True)
        try:
            os.rename(passing, name, src_dir_fd=directory, dst_dir_fd=directory)
        except OSError:
            os.unlink(passing, dir_fd=directory)
            raise

    def _forget(self, path: str) -> None:
        unfinished = self._unfinished.pop(path, None)
        if unfinished is not None:
            unfinished.close()

    def close(self) -> None:
        """Give up what is unfinished."""
        for path in list(self._unfinished):
            self._forget(path)
