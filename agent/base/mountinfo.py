"""The mounts of this process's mount namespace.  Source: proc_pid_mountinfo(5)."""

from __future__ import annotations

import os

PATH = "/proc/self/mountinfo"


def unescape(path: str) -> str:
    """Undo the octal escapes that stand for blanks, line ends and backslashes; all other characters are kept."""
    if "\\" not in path:
        return path
    data = os.fsencode(path).decode("unicode_escape").encode("latin-1")
    return os.fsdecode(data)


def mount_points(top: str, mountinfo: str = PATH) -> list[str]:
    """Return the mount points at and below a directory, one per mount, in mount order."""
    with open(mountinfo, "rb") as lines:  # noqa: PTH123 - no pathlib at start
        points = [unescape(os.fsdecode(line.split(b" ", 5)[4])) for line in lines]
    top = top.rstrip("/")
    return [point for point in points if point == top or point.startswith(f"{top}/")]
