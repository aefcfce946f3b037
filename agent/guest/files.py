"""Files that the host sends in pieces: resolv.conf, secrets, anything that cannot be shared otherwise.

Containers may have write access to the directories around, so no symbolic link is followed in any path component
(openat2(2), RESOLVE_NO_SYMLINKS), and a file has no name until it is complete (O_TMPFILE, open(2)): nobody sees a
partial file, and nothing is left if the rest never arrives.
"""

from __future__ import annotations

import os
import stat

from caisson.agent.base import syscalls
from caisson.agent.base.errors import InvalidArgument, PathOutside, SystemCallFailed
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import ClassVar

ROOT = "/run"

RESOLVE = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS | syscalls.RESOLVE_NO_MAGICLINKS

#: Maximum number of incomplete files; beyond it, the oldest is dropped.
UNFINISHED = 32


class Piece(Record):
    """A piece of a file: `data` at `offset` of its `size` bytes.

    `mode` may include a file type (inode(7)): a directory has no data, a symbolic link's data is its target.
    """

    path: str
    size: int
    offset: int
    data: bytes
    mode: int = 0o600
    directory_mode: int = 0o700
    uid: int = 0
    gid: int = 0


class _Unfinished:
    """A file without a name yet, and the parts received so far."""

    def __init__(self, directory: int, size: int) -> None:
        self.size = size
        self.fd = os.open(".", os.O_TMPFILE | os.O_RDWR | os.O_CLOEXEC, 0o600, dir_fd=directory)
        self._parts: list[tuple[int, int]] = []  # from, to; in order, not touching

    @property
    def complete(self) -> bool:
        return not self.size or self._parts == [(0, self.size)]

    def contradicts(self, offset: int, data: bytes) -> bool:
        """Return whether different data was received for this range before: the host has started over."""
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

    #: Accepted types; 0 also means a file.
    TYPES: ClassVar[tuple[int, ...]] = (0, stat.S_IFREG)

    #: Accepted mode bits: not the host's set-user-ID.
    MODE = 0o777

    def __init__(self, root: str = ROOT) -> None:
        self._root = root
        self._unfinished: dict[str, _Unfinished] = {}
        self._count = 0

    def write(self, piece: Piece) -> None:
        """Take a piece, in any order; with the last one the file appears, replacing any existing one.

        A repeated piece is accepted; one with different contents starts the file over.  Raises PathOutside for a path
        outside, InvalidArgument, or SystemCallFailed.
        """
        path = os.path.normpath(piece.path)  # as hosts expect: "/run/../etc" is a path outside
        if not path.startswith(f"{self._root}/"):
            raise PathOutside(path=path, root=self._root)
        if "\0" in path:
            raise InvalidArgument("the path has a NUL in it")
        kind = stat.S_IFMT(piece.mode)
        if kind not in self.TYPES:
            raise InvalidArgument(f"{path}: mode {piece.mode:#o} is of a type that cannot be sent")
        fits = 0 <= piece.offset <= piece.offset + len(piece.data) <= piece.size
        if kind in Files.TYPES and not fits:
            raise InvalidArgument(
                f"{path}: {len(piece.data)} bytes at {piece.offset} do not fit into a file of {piece.size} bytes"
            )
        directory, _, name = path.removeprefix(f"{self._root}/").rpartition("/")
        try:
            at = self._open_directory(directory, piece)
            try:
                self._put(at, name, path, piece)
            finally:
                os.close(at)
        except OSError as error:
            self._forget(path)
            raise SystemCallFailed(f"{path}: {os.strerror(error.errno or 0)}") from error

    def _put(self, directory: int, name: str, path: str, piece: Piece) -> None:
        """Take a piece of a file in a directory."""
        unfinished = self._unfinished.get(path)
        if unfinished and (unfinished.size != piece.size or unfinished.contradicts(piece.offset, piece.data)):
            self._forget(path)
            unfinished = None
        if unfinished is None:
            unfinished = self._unfinished[path] = _Unfinished(directory, piece.size)
            while len(self._unfinished) > UNFINISHED:
                self._forget(next(iter(self._unfinished)))
        unfinished.write(piece.offset, piece.data)
        if unfinished.complete:
            os.fchown(unfinished.fd, piece.uid, piece.gid)
            os.fchmod(unfinished.fd, piece.mode & self.MODE)
            self._name(unfinished.fd, directory, name)
            self._forget(path)

    def _open_directory(self, path: str, piece: Piece) -> int:
        """Open a directory below the root, creating missing components."""
        at = os.open(self._root, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        for name in path.split("/") if path else ():
            try:
                try:
                    os.mkdir(name, piece.directory_mode & 0o777, dir_fd=at)
                    self._made(at, name, piece)
                except FileExistsError:
                    pass
                inner = syscalls.openat2(at, name, os.O_PATH | os.O_DIRECTORY, resolve=RESOLVE)
            finally:
                os.close(at)
            at = inner
        return at

    def _made(self, at: int, name: str, piece: Piece) -> None:
        """Set the owner of a directory that was created as a file's parent; here it stays root's."""

    def _name(self, fd: int, directory: int, name: str) -> None:
        """Give the file its name, replacing any existing one: link(2) cannot replace, rename(2) can."""
        passing = self._passing_name()
        os.link(f"/proc/self/fd/{fd}", passing, dst_dir_fd=directory, follow_symlinks=True)
        self._rename(directory, passing, name)

    def _passing_name(self) -> str:
        self._count += 1
        return f".caisson-copy-{os.getpid()}-{self._count}"

    @staticmethod
    def _rename(directory: int, passing: str, name: str) -> None:
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
        """Drop incomplete files."""
        for path in list(self._unfinished):
            self._forget(path)


class Trees(Files):
    """Trees of files below one directory, created with the first file: volumes of a pod.

    Also accepts directories, symbolic links and any mode, and sets owners of created parents.  A file replaces anything
    in its place, even a directory.
    """

    TYPES: ClassVar[tuple[int, ...]] = (0, stat.S_IFREG, stat.S_IFDIR, stat.S_IFLNK)
    MODE = 0o7777

    def write(self, piece: Piece) -> None:
        """Take a directory, a symbolic link, or a piece of a file.  Raises as Files.write."""
        os.makedirs(self._root, 0o755, exist_ok=True)  # noqa: PTH103 - no pathlib at start
        super().write(piece)

    def _put(self, directory: int, name: str, path: str, piece: Piece) -> None:
        kind = stat.S_IFMT(piece.mode)
        if kind == stat.S_IFDIR:
            self._put_directory(directory, name, piece)
        elif kind == stat.S_IFLNK:
            self._remove_tree(directory, name)
            passing = self._passing_name()
            os.symlink(os.fsdecode(piece.data), passing, dir_fd=directory)
            os.chown(passing, piece.uid, piece.gid, dir_fd=directory, follow_symlinks=False)
            self._rename(directory, passing, name)
        else:
            if piece.offset == 0:
                self._remove_tree(directory, name)
            super()._put(directory, name, path, piece)

    def _put_directory(self, directory: int, name: str, piece: Piece) -> None:
        try:
            os.mkdir(name, 0o700, dir_fd=directory)
        except FileExistsError:
            if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                os.unlink(name, dir_fd=directory)
                os.mkdir(name, 0o700, dir_fd=directory)
        self._own(directory, name, piece.uid, piece.gid, piece.mode & self.MODE)

    def _made(self, at: int, name: str, piece: Piece) -> None:
        self._own(at, name, piece.uid, piece.gid, piece.directory_mode & self.MODE)

    @staticmethod
    def _own(at: int, name: str, uid: int, gid: int, mode: int) -> None:
        fd = syscalls.openat2(at, name, os.O_RDONLY | os.O_DIRECTORY, resolve=RESOLVE)
        try:
            os.fchown(fd, uid, gid)
            os.fchmod(fd, mode)
        finally:
            os.close(fd)

    @staticmethod
    def _remove_tree(directory: int, name: str) -> None:
        """Remove a directory in the way; anything else is replaced by a rename."""
        try:
            if not stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode):
                return
        except FileNotFoundError:
            return
        import shutil  # late: it imports much, and this is rare

        shutil.rmtree(name, dir_fd=directory)
