"""Unpack a tar archive from a container below one directory of the host and nowhere else.

Names are walked from the directory's descriptor without following any link (O_NOFOLLOW), so neither the archive's
contents nor existing files can lead elsewhere.  No more is written than was received, and each file appears under its
name only when complete.
"""

from __future__ import annotations

import contextlib
import os
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator

from caisson.agent.client.caller import write_all
from caisson.agent.client.errors import CopyError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path
    from typing import Self

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: Mode bits without set-uid and set-gid: a file from a container gets a new owner.
MODE = 0o777

#: Maximum size of an extension header (a long name, pax records), and how many may follow each other.
MAX_HEADER = 1 << 20
MAX_HEADERS = 8

#: Maximum number of devices, which are left out and named: each name may be as long as a header.
MAX_LEFT_OUT = 10_000
MAX_NAME = 4096

#: Seconds since 1970: the range that file systems support.
MAX_TIME = (1 << 34) - 1

EXTRA = (
    tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK, tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE,
)  # fmt: skip


class _Member(tarfile.TarInfo):
    """A member whose headers are read in bounded memory; sparse files are not expected."""

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> Self:
        """Read a member: tarfile would take an invalid one for the archive's end."""
        try:
            return super().fromtarfile(archive)
        except (tarfile.InvalidHeaderError, tarfile.TruncatedHeaderError) as error:  # type: ignore[attr-defined]
            raise CopyError(f"archive: the container sent a damaged header: {error}") from error

    def _proc_member(self, archive: tarfile.TarFile) -> tarfile.TarInfo:
        if self.type in EXTRA and not 0 <= self.size <= MAX_HEADER:
            raise CopyError(f"archive: the container sent a header of {self.size} bytes; {MAX_HEADER} are accepted")
        if self.type == tarfile.XGLTYPE:  # tarfile would keep all of them
            raise CopyError("archive: the container sent a global header, which was not requested")
        if self.type == tarfile.GNUTYPE_SPARSE:
            self._refuse_sparse(self)
        assert isinstance(archive, ReceivedArchive)
        archive.headers += 1
        if archive.headers > MAX_HEADERS:
            raise CopyError("archive: the container sent more headers than files")
        member: tarfile.TarInfo = super()._proc_member(archive)  # type: ignore[misc]
        return member

    def _refuse_sparse(self, member: tarfile.TarInfo, *_: object) -> None:
        """Refuse a sparse file before its map is read, which may be endless."""
        raise CopyError(f"{member.name!r}: the container sent it as a sparse file, which was not requested")

    _proc_gnusparse_00 = _proc_gnusparse_01 = _proc_gnusparse_10 = _refuse_sparse


class _Stream:
    """What tarfile reads headers from: a file whose pieces are read once, and in which only what follows is reached."""

    def __init__(self, receive: Callable[[], bytes | memoryview]) -> None:
        self._receive = receive
        self._piece = memoryview(b"")
        self._at = 0

    def tell(self) -> int:
        return self._at

    def seek(self, at: int) -> None:
        if at < self._at:
            raise tarfile.StreamError("seeking backwards is not allowed")
        for _ in self.parts(at - self._at):
            pass

    def read(self, size: int) -> bytes:
        return b"".join(self.parts(size))

    def parts(self, size: int) -> Iterator[memoryview]:
        """Yield the next bytes, without copying them: fewer than ``size`` if the stream ends."""
        while size > 0:
            if not self._piece:
                self._piece = memoryview(self._receive())
                if not self._piece:
                    return
            part, self._piece = self._piece[:size], self._piece[size:]
            self._at += len(part)
            size -= len(part)
            yield part


class ReceivedArchive(tarfile.TarFile):
    """An archive sent by a container, one member after the other."""

    headers = 0

    def __init__(self, receive: Callable[[], bytes | memoryview]) -> None:
        """``receive`` returns the next piece, empty at the end.  Raises CopyError, tarfile.TarError."""
        self.stream = _Stream(receive)
        super().__init__(
            fileobj=self.stream,  # type: ignore[arg-type]
            tarinfo=_Member,
            errors="surrogateescape",
            encoding="utf-8",
        )

    def next(self) -> tarfile.TarInfo | None:
        self.headers = 0
        self.members: list[tarfile.TarInfo] = []  # tarfile would keep them all
        try:
            return super().next()
        except (ValueError, LookupError, ArithmeticError) as error:  # from invalid numbers and maps
            raise CopyError(f"archive: the container sent a damaged header: {error}") from error

    def write_contents(self, member: tarfile.TarInfo, target: int) -> None:
        """Write the contents of the current member to a descriptor.  Raises tarfile.TarError, OSError."""
        size = member.size
        for part in self.stream.parts(size):
            write_all(target, part)
            size -= len(part)
        if size:
            raise tarfile.ReadError("unexpected end of data")


def unpack(archive: ReceivedArchive, directory: Path, old: str, new: str) -> list[str]:
    """Unpack an archive whose names all begin with ``old``, as ``new`` in the directory, or into it with ".".

    New files get the archive's mode minus the umask, and belong to the caller.  Existing files are replaced but keep
    their modes, and directories are kept.  Returns the names of files left out: devices.  Raises CopyError for other
    names and invalid numbers, OSError, and tarfile.TarError.
    """
    left_out: list[str] = []
    times: list[tuple[str, float, int]] = []  # and modes of new directories, set last as they may be read-only
    root = os.open(directory, DIRECTORY & ~os.O_NOFOLLOW)
    try:
        for member in archive:
            _check_numbers(member)
            parts = _parts(member.name, old, new)
            if not parts:
                continue  # the directory itself, which exists
            with _directory(root, parts[:-1]) as place:
                if member.isdir():
                    if _make_directory(place, parts[-1], member):
                        times.append(("/".join(parts), member.mtime, member.mode))
                elif member.isfile() or member.issym() or member.islnk() or member.isfifo():
                    _replace(archive, member, place, parts[-1], root, old, new)
                elif len(left_out) == MAX_LEFT_OUT:
                    raise CopyError(f"archive: the container sent more than {MAX_LEFT_OUT} devices")
                else:
                    left_out.append(member.name[:MAX_NAME])
        for path, mtime, mode in reversed(times):
            with _directory(root, path.split("/")) as place:
                os.utime(place, (mtime, mtime))
                if mode & 0o700 != 0o700:
                    os.fchmod(place, os.fstat(place).st_mode & mode & MODE)
    finally:
        os.close(root)
    return left_out


def unpack_to(archive: ReceivedArchive, target: int) -> None:
    """Write the one file of an archive to a device, a pipe or a FIFO, given by its descriptor.

    Raises CopyError, OSError, TarError.
    """
    for member in archive:
        if not member.isfile():
            raise CopyError(f"{member.name!r}: not a regular file; the target takes nothing else")
        _check_numbers(member)
        archive.write_contents(member, target)


def _check_numbers(member: tarfile.TarInfo) -> None:
    if not 0 <= member.mtime <= MAX_TIME or member.size < 0:  # NaN is not, either
        raise CopyError(f"{member.name!r}: the container sent it with the time {member.mtime} and size {member.size}")
    if "\0" in member.linkname:
        raise CopyError(f"{member.name!r}: the container sent it as a link to {member.linkname!r}")


def _make_directory(place: int, name: str, member: tarfile.TarInfo) -> bool:
    """Create a directory; returns whether it is new."""
    try:
        os.mkdir(name, member.mode & MODE | 0o700, dir_fd=place)
    except FileExistsError:
        if not stat.S_ISDIR(os.stat(name, dir_fd=place, follow_symlinks=False).st_mode):
            raise CopyError(f"{name}: exists and is not a directory; remove it first") from None
        return False
    return True


def _replace(
    archive: ReceivedArchive, member: tarfile.TarInfo, place: int, name: str, root: int, old: str, new: str
) -> None:
    """Create a file, a link or a FIFO under a temporary name, and rename it when complete."""
    there: os.stat_result | None = None
    with contextlib.suppress(FileNotFoundError):
        there = os.stat(name, dir_fd=place, follow_symlinks=False)
    if there is not None and stat.S_ISDIR(there.st_mode):
        raise CopyError(f"{name}: is a directory; a file cannot replace it")
    made = f".caisson-{os.urandom(16).hex()}"
    try:
        if member.issym():
            os.symlink(member.linkname, made, dir_fd=place)
        elif member.islnk():
            *others, target = _parts(member.linkname, old, new)
            with _directory(root, tuple(others)) as source:
                if stat.S_ISDIR(os.stat(target, dir_fd=source, follow_symlinks=False).st_mode):
                    raise CopyError(f"{member.name!r}: a hard link to a directory")
                os.link(target, made, src_dir_fd=source, dst_dir_fd=place, follow_symlinks=False)
        elif member.isfifo():
            os.mkfifo(made, member.mode & MODE, dir_fd=place)
        else:
            _write(archive, member, os.open(made, NEW_FILE, member.mode & MODE, dir_fd=place), there)
        os.rename(made, name, src_dir_fd=place, dst_dir_fd=place)
    finally:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(made, dir_fd=place)


def _write(archive: ReceivedArchive, member: tarfile.TarInfo, descriptor: int, there: os.stat_result | None) -> None:
    try:
        archive.write_contents(member, descriptor)
        if there is not None and stat.S_ISREG(there.st_mode):
            os.fchmod(descriptor, there.st_mode & MODE)
        os.utime(descriptor, (member.mtime, member.mtime))
    finally:
        os.close(descriptor)


def _parts(name: str, old: str, new: str) -> tuple[str, ...]:
    """Return the components of a member's name, with the first one renamed; "." is left out.  Raises CopyError."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if old in ("", "."):
        parts = [old, *parts]
    if name.startswith("/") or ".." in parts or "\0" in name or not parts or parts[0] != old:
        raise CopyError(f"{name!r}: the container sent it, but it was not requested")
    return tuple(part for part in (new, *parts[1:]) if part != ".")


@contextlib.contextmanager
def _directory(root: int, parts: Iterable[str]) -> Iterator[int]:
    """Open a directory below another; links are not followed.  Raises OSError."""
    at = os.dup(root)
    try:
        for name in parts:
            inner = os.open(name, DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        yield at
    finally:
        os.close(at)
