"""The mounts of this process's mount namespace.  Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

PATH = "/proc/self/mountinfo"


def unescape(path: str) -> str:
    """Undo the octal escapes that stand for blanks, line ends and backslashes; all other characters are kept."""
    if "\\" not in path:
        return path
    data = os.fsencode(path).decode("unicode_escape").encode("latin-1")
    return os.fsdecode(data)


def mounts(mountinfo: str = PATH) -> Iterator[tuple[str, str, str, str]]:
    """Yield each mount in mount order: its mount point, its file system's type and source, its superblock's options."""
    with open(mountinfo, "rb") as lines:  # noqa: PTH123 - no pathlib at start
        for line in lines:
            mount, _, filesystem = os.fsdecode(line.rstrip(b"\n")).partition(" - ")
            fields = mount.split(" ", 5)
            if len(fields) > 4:
                fstype, _, rest = filesystem.partition(" ")
                source, _, options = rest.rpartition(" ")
                yield unescape(fields[4]), fstype, source, options


def mount_points(top: str, mountinfo: str = PATH) -> list[str]:
    """Return the mount points at and below a directory, one per mount, in mount order."""
    top = top.rstrip("/")
    return [point for point, *_ in mounts(mountinfo) if point == top or point.startswith(f"{top}/")]
