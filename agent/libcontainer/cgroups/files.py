"""Files of the cgroup filesystems: read, written, and written back."""

from __future__ import annotations

import os
from errno import EBUSY

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

DIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC

#: Bytes of a cgroup.procs to read: half a million processes.
MAX_PROCS = 1 << 22

#: Files in which a line of several words is one value, not a key and a value.
NOT_KEYED = ("cpu.max",)


def read(path: str) -> str:
    """Return the content.  Raises OSError."""
    with open(path, encoding="utf-8") as file:  # noqa: PTH123 - no pathlib at start
        return file.read()


def write(path: str, value: str) -> None:
    """Write a value by a single write(2), as the kernel requires.  Raises OSError."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        os.write(fd, (value or "\n").encode())
    finally:
        os.close(fd)


def restore_value(file: str, value: str, before: str) -> str:
    """Return what restores `file` as it was `before` the write of `value`; "" is written as an empty line.

    Many files hold one value per key, which comes first: a device, an interface, `default`.  Then only the line of the
    written key matters; if there was none, the value is reset in that file's own syntax.
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


def walk(path: str) -> Iterator[tuple[int, int, str]]:
    """Walk a cgroup and all below it, innermost first: yield its descriptor, its parent's, and its name there.

    Both stay open until the next step.  A container may nest cgroups whose paths are longer than PATH_MAX, and as many
    as it likes in version 1: so this never holds more than two descriptors, and uses no paths.  Cgroups removed
    meanwhile are skipped.  Raises OSError.
    """
    try:
        at = os.open(os.path.dirname(path), DIRECTORY)  # noqa: PTH120 - no pathlib at start
    except FileNotFoundError:
        return
    above = -1
    way: list[str] = []
    pending = [[os.path.basename(path)]]  # noqa: PTH119 - to be visited, by level
    try:
        while True:
            if pending[-1]:
                name = pending[-1].pop()
                try:
                    below = os.open(name, DIRECTORY | os.O_NOFOLLOW, dir_fd=at)
                except FileNotFoundError:
                    continue
                os.close(at)
                at = below
                way.append(name)
                pending.append(_subdirectories(at))
                continue
            if not way:
                return
            above = os.open("..", DIRECTORY, dir_fd=at)
            yield at, above, way.pop()
            pending.pop()
            os.close(at)
            at, above = above, -1
    finally:
        os.close(at)
        if above >= 0:
            os.close(above)


def _subdirectories(fd: int) -> list[str]:
    try:
        with os.scandir(fd) as entries:
            return [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:  # just removed
        return []


def pids_in(path: str) -> list[int]:
    """List all processes in the cgroup and below; none if it has been removed."""
    return [pid for fd, _, _ in walk(path) for pid in _pids(fd)]


def open_around(path: str, pid: int) -> int:
    """Open the cgroup, among this one and those below it, that a process is in; -1 if there is none."""
    for fd, _, _ in walk(path):
        if pid in _pids(fd):
            return os.dup(fd)
    return -1


def _pids(directory: int) -> list[int]:
    try:
        fd = os.open("cgroup.procs", os.O_RDONLY | os.O_CLOEXEC, dir_fd=directory)
        with open(fd, "rb") as file:  # noqa: PTH123 - a descriptor
            return [int(line) for line in file.read(MAX_PROCS).splitlines(keepends=True) if line.endswith(b"\n")]
    except OSError:  # just removed, or threaded
        return []


def remove_tree(path: str) -> bool:
    """Remove the cgroup and all below; False while the kernel is still tearing down dead processes.  Raises OSError."""
    for _, above, name in walk(path):
        try:
            os.rmdir(name, dir_fd=above)
        except FileNotFoundError:
            continue
        except OSError as e:
            if e.errno != EBUSY:
                raise
            return False
    return True


def remove_around(path: str, made: set[str]) -> None:
    """Remove the parents of `path`, as long as they are in `made` and empty."""
    around = os.path.dirname(path)  # noqa: PTH120 - no pathlib at start
    while around in made:
        try:
            os.rmdir(around)  # noqa: PTH106 - no pathlib at start
        except OSError:  # in use by another
            return
        made.discard(around)
        around = os.path.dirname(around)  # noqa: PTH120 - no pathlib at start


def remove_empty(paths: Iterable[str]) -> None:
    """Remove cgroups without processes or children; others stay."""
    for path in paths:
        try:
            os.rmdir(path)  # noqa: PTH106 - no pathlib at start
        except OSError:
            continue


def remove_all(made: Iterable[str]) -> None:
    """Remove empty directories, newest first, as far as possible."""
    for path in reversed(list(made)):
        try:
            os.rmdir(path)  # noqa: PTH106 - no pathlib at start
        except OSError:
            return
