"""Unpack a tar archive that somebody else made, below one directory and nowhere else.

Names are walked from the directory's descriptor without following any link (O_NOFOLLOW), so neither what is in the
archive nor what is there already leads elsewhere.  Links are made as they are, and never used.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import stat
import tarfile
from collections.abc import Iterator
from pathlib import Path

from caisson.agent.client.errors import UsageError

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

#: Without set-uid and set-gid: a file from a container becomes its new owner's.
MODE = 0o777


def unpack(archive: tarfile.TarFile, directory: Path, old: str, new: str) -> list[str]:
    """Unpack an archive whose names all begin with ``old``, as ``new`` in the directory; what is there is replaced.

    Owners are the caller's.  Returns the names of what is left out: devices.  Raises UsageError for an archive with
    other names, OSError, and tarfile.TarError.
    """
    left_out: list[str] = []
    modes: list[tuple[tuple[str, ...], tarfile.TarInfo]] = []  # of directories: last, they may be read-only
    root = os.open(directory, DIRECTORY & ~os.O_NOFOLLOW)
    try:
        for member in archive:
            parts = _parts(member.name, old, new)
            with _directory(root, parts[:-1]) as place:
                if member.isdir():
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(parts[-1], 0o700, dir_fd=place)
                    modes.append((parts, member))
                elif not _make(archive, member, place, parts[-1], root, old, new):
                    left_out.append(member.name)
        for parts, member in reversed(modes):
            with _directory(root, parts) as place:
                os.fchmod(place, member.mode & MODE)
                os.utime(place, (member.mtime, member.mtime))
    finally:
        os.close(root)
    return left_out


def _make(
    archive: tarfile.TarFile, member: tarfile.TarInfo, place: int, name: str, root: int, old: str, new: str
) -> bool:
    """Make what is no directory, in place of what is there; whether it is something that is made."""
    if not (member.isfile() or member.issym() or member.islnk() or member.isfifo()):
        return False
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=place)
    if member.issym():
        os.symlink(member.linkname, name, dir_fd=place)
    elif member.islnk():
        *others, target = _parts(member.linkname, old, new)
        with _directory(root, tuple(others)) as there:
            if stat.S_ISDIR(os.stat(target, dir_fd=there, follow_symlinks=False).st_mode):
                raise UsageError(f"{member.name!r}: a hard link to a directory")
            os.link(target, name, src_dir_fd=there, dst_dir_fd=place, follow_symlinks=False)
    elif member.isfifo():
        os.mkfifo(name, member.mode & MODE, dir_fd=place)
    else:
        source = archive.extractfile(member)
        assert source is not None
        with os.fdopen(os.open(name, NEW_FILE, 0o600, dir_fd=place), "wb") as file:
            shutil.copyfileobj(source, file, 1 << 20)
            os.fchmod(file.fileno(), member.mode & MODE)
            file.flush()
            os.utime(file.fileno(), (member.mtime, member.mtime))
    return True


def _parts(name: str, old: str, new: str) -> tuple[str, ...]:
    """The components of a member's name, with the first one renamed.  Raises UsageError."""
    parts = [part for part in name.split("/") if part not in ("", ".")]
    if old in ("", "."):
        parts = [old, *parts]
    if name.startswith("/") or ".." in parts or "\0" in name or not parts or parts[0] != old:
        raise UsageError(f"the container sent {name!r}, which was not asked for")
    return (new, *parts[1:])


@contextlib.contextmanager
def _directory(root: int, parts: tuple[str, ...]) -> Iterator[int]:
    """A descriptor of a directory below another; links are not followed.  Raises OSError."""
    at = os.dup(root)
    try:
        for name in parts:
            inner = os.open(name, DIRECTORY, dir_fd=at)
            os.close(at)
            at = inner
        yield at
    finally:
        os.close(at)
