"""A container's state directory: find, lock, list and remove it."""

from __future__ import annotations

import os

from caisson.agent.libcontainer import faults
from caisson.agent.libcontainer import state as files


class ContainerError(Exception):
    """An operation that the container's state does not allow; str() is the message that callers of runc match."""


class DoesNotExist(ContainerError):
    """No such container."""

    def __init__(self) -> None:
        super().__init__("container does not exist")


class ContainerLock:
    """An exclusive lock on a container's directory, for a `with` block that changes it."""

    def __init__(self, directory: str, *, wait: bool = True) -> None:
        """Raises DoesNotExist; BlockingIOError without `wait` if another has it."""
        import fcntl

        self._fd = -1
        while True:
            try:
                fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
            except FileNotFoundError:
                raise DoesNotExist from None
            try:
                fcntl.flock(fd, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                os.close(fd)
                raise
            try:
                if os.path.samestat(os.stat(directory), os.fstat(fd)):  # noqa: PTH116 - no pathlib at start
                    break
            except FileNotFoundError:
                pass
            os.close(fd)  # it was removed meanwhile
        self._fd = fd

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: object) -> None:
        os.close(self._fd)


def list_ids(root: str) -> list[str]:
    """List the ids of the containers below a root, in order; half-created ones are left out.  Raises OSError."""
    names = sorted(os.listdir(root))  # noqa: PTH208 - no pathlib at start
    return [name for name in names if os.path.exists(f"{root}/{name}/{files.FILE}")]  # noqa: PTH110


def remove_directory(directory: str) -> None:
    """Remove a container's directory and its contents, if it exists; never follows a link.  Raises OSError."""
    try:
        for _, directories, names, place in os.fwalk(directory, topdown=False):
            for name in names:
                _unlink(name, place)
                faults.reach("delete_file")
            for name in directories:
                try:
                    os.rmdir(name, dir_fd=place)
                except NotADirectoryError:
                    _unlink(name, place)  # a link to one
        os.rmdir(directory)  # noqa: PTH106 - no pathlib at start
    except FileNotFoundError:
        pass


def _unlink(name: str, directory: int) -> None:
    try:
        os.unlink(name, dir_fd=directory)
    except FileNotFoundError:
        pass
