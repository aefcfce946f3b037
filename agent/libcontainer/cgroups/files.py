"""Files of the cgroup filesystems: read, written, and written back."""

from __future__ import annotations

import os
from errno import EBUSY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable

#: Files whose lines with several words are one value, not values by key.
NOT_KEYED = ("cpu.max",)


def read(path: str) -> str:
    """The content.  Raises OSError."""
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - no pathlib at start
        return file.read()


def write(path: str, value: str) -> None:
    """One write, as the kernel wants it.  Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, (value or "\n").encode())
    finally:
        os.close(fd)


def restoring(file: str, value: str, before: str) -> str:
    """What to write to `file` for it to be as it was `before` the write of `value`; "" is written as an empty line.

    Many files hold values by a key that comes first: a device, an interface, `default`.  Only the line of the key that
    was written is of interest then, and where there was none the value is taken back in the words of that file.
    """
    lines = before.splitlines()
    if file == "memory.oom_control":
        return next((line.split()[1] for line in lines if line.startswith("oom_kill_disable ")), "0")
    keyed = file not in NOT_KEYED and " " in value
    if not keyed:
        weight = next((line for line in lines if line.startswith("default ")), None)
        return weight or before.strip()
    key, _, rest = value.partition(" ")
    for line in lines:
        if line.split()[:1] == [key]:
            return line
    if "=" in rest:
        names = (word.partition("=")[0] for word in rest.split())
        return " ".join([key, *(f"{name}={'0' if name == 'target' else 'max'}" for name in names)])
    return f"{key} {'default' if 'weight' in file else '0'}"


def tree(path: str) -> list[str]:
    """The cgroup and all below it; none if it is gone."""
    return [directory for directory, _, _ in os.walk(path)]


def pids_in(path: str) -> list[int]:
    """All processes of the cgroup and below, none if it is gone."""
    found: list[int] = []
    for directory in tree(path):
        try:
            found += map(int, read(f"{directory}/cgroup.procs").split())
        except OSError:  # just removed, or threaded
            continue
    return found


def remove_tree(path: str) -> bool:
    """Remove the cgroup and all below; False while the kernel still tears down dead processes.  Raises OSError."""
    try:
        for directory in sorted(tree(path), key=len, reverse=True):
            os.rmdir(directory)  # noqa: PTH106 - no pathlib at start
    except FileNotFoundError:
        return remove_tree(path)
    except OSError as e:
        if e.errno != EBUSY:
            raise
        return False
    return True


def remove_around(path: str, made: set[str]) -> None:
    """Remove the directories above `path`, as long as they are of `made` and empty."""
    around = os.path.dirname(path)  # noqa: PTH120 - no pathlib at start
    while around in made:
        try:
            os.rmdir(around)  # noqa: PTH106 - no pathlib at start
        except OSError:  # another is in it
            return
        made.discard(around)
        around = os.path.dirname(around)  # noqa: PTH120 - no pathlib at start


def remove_empty(paths: Iterable[str]) -> None:
    """Remove cgroups that nothing is in or below; others stay."""
    for path in paths:
        try:
            os.rmdir(path)  # noqa: PTH106 - no pathlib at start
        except OSError:
            continue


def remove_all(made: Iterable[str]) -> None:
    """Remove empty directories, the last made first, as far as it goes."""
    for path in reversed(list(made)):
        try:
            os.rmdir(path)  # noqa: PTH106 - no pathlib at start
        except OSError:
            return
