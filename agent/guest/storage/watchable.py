"""Small host directories whose changes containers must see: config maps and secrets.

virtiofs does not report changes made by the host (inotify(7) only sees the guest's own), so a directory is polled and
copied.  One too large to copy is bind-mounted instead: it is current, but changes are not reported. Kubernetes changes
such a directory by a rename of the link ``..data``; links are changed last here, too.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import stat
import threading

from caisson.agent.base import syscalls
from caisson.agent.base.errors import SystemCallFailed, reason
from caisson.agent.guest.storage import mounts

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterator

    from caisson.agent.base.log import Log

#: Polling interval in seconds.
POLL_INTERVAL = 2.0

#: Maximum files, and total bytes, to copy.  Kubernetes allows a config map 1 MiB.
MAX_FILES = 16
MAX_BYTES = 1 << 20

#: The attributes that show whether a file has changed.
Stamp = tuple[int, int, int, int, int]


class TreeTooLarge(Exception):
    """The directory is too large to copy."""


class Watched:
    """A directory or file kept in sync with another one."""

    def __init__(self, source: str, target: str, log: Log) -> None:
        self._source = source
        self._target = target
        self._log = log
        self._seen: dict[str, Stamp] = {}
        self._task: asyncio.Task[None] | None = None
        self._bound = False
        self._lock = threading.Lock()  # cancelling the task does not stop a copying thread
        self._stopped = False

    async def start(self) -> None:
        """Copy it, and keep it in sync.  Raises SystemCallFailed."""
        await asyncio.to_thread(self._begin)
        if not self._bound:
            self._task = asyncio.get_running_loop().create_task(self._watch())

    async def stop(self) -> None:
        """Stop, and remove the copy."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await asyncio.to_thread(self._remove)

    def _begin(self) -> None:
        try:
            if os.path.isdir(self._source):  # noqa: PTH112 - no pathlib at start
                mounts.make_directory(self._target)
            self._update_or_bind()
        except OSError as error:
            raise SystemCallFailed(f"Could not copy {self._source}: {reason(error)}") from error

    async def _watch(self) -> None:
        while not self._bound:
            await asyncio.sleep(POLL_INTERVAL)
            try:
                await asyncio.to_thread(self._update_or_bind)
            except (OSError, SystemCallFailed) as error:  # probably in the middle of a change: the next poll will tell
                self._log("debug", "a watched directory could not be copied", source=self._source, error=str(error))

    def _update_or_bind(self) -> None:
        try:
            self._update()
        except TreeTooLarge:
            self._bind()

    def _update(self) -> None:
        """Copy changed files, and remove deleted ones.  Raises TreeTooLarge, or OSError."""
        with self._lock:
            found = dict(_files(self._source))
            if found != self._seen and not self._stopped:
                self._copy_changes(found)

    def _copy_changes(self, found: dict[str, Stamp]) -> None:
        directory = stat.S_ISDIR(os.stat(self._source).st_mode)  # noqa: PTH116 - no pathlib at start
        if not directory:
            os.close(mounts.open_point(self._target, 0o755, directory=False))
        root = mounts.open_point(self._target if directory else os.path.dirname(self._target), 0o755)  # noqa: PTH120
        try:
            links = [name for name in found if stat.S_ISLNK(found[name][0])]
            for name in [*(name for name in found if name not in links), *links]:
                if self._seen.get(name) != found[name]:
                    where = name if directory else os.path.basename(self._target)  # noqa: PTH119
                    _copy(f"{self._source}/{name}" if directory else self._source, root, where, found[name][0])
            for name in sorted(self._seen.keys() - found.keys(), reverse=True):
                _delete(root, name)
        finally:
            os.close(root)
        self._seen = found

    def _bind(self) -> None:
        from caisson.agent.guest.storage.storages import Storage

        with self._lock:
            if not self._stopped:
                mounts.mount(Storage("watchable-bind", self._source, "bind", self._target))
                self._bound = True

    def _remove(self) -> None:
        with self._lock:
            self._stopped = True
        if self._bound:
            try:
                mounts.unmount(self._target)
            except OSError as error:
                self._log("error", "a storage could not be unmounted", mount_point=self._target, error=str(error))
                return
        if os.path.isdir(self._target):  # noqa: PTH112
            shutil.rmtree(self._target, ignore_errors=True)
        elif os.path.lexists(self._target):
            os.unlink(self._target)  # noqa: PTH108


def _files(source: str) -> Iterator[tuple[str, Stamp]]:
    """Yield everything below a path, directories before their contents.  Raises TreeTooLarge, or OSError."""
    count = size = 0
    waiting = [""]
    while waiting:
        name = waiting.pop()
        status = os.lstat(f"{source}/{name}" if name else source)
        if not name and stat.S_ISLNK(status.st_mode):
            status = os.stat(source)  # noqa: PTH116
        count += not stat.S_ISDIR(status.st_mode)
        size += status.st_size if stat.S_ISREG(status.st_mode) else 0
        if count > MAX_FILES or size > MAX_BYTES:
            raise TreeTooLarge
        if name or not stat.S_ISDIR(status.st_mode):
            yield name, (status.st_mode, status.st_uid, status.st_gid, status.st_size, status.st_mtime_ns)
        if stat.S_ISDIR(status.st_mode):
            inner = sorted(os.listdir(f"{source}/{name}"), reverse=True)  # noqa: PTH208
            if len(inner) > 2 * MAX_FILES:
                raise TreeTooLarge
            waiting += [f"{name}/{one}".lstrip("/") for one in inner]


def _copy(source: str, root: int, name: str, mode: int) -> None:
    """Copy a file, replacing any existing one.  Raises OSError."""
    parent, _, last = name.rpartition("/")
    at = syscalls.openat2(root, parent or ".", os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH)
    try:
        if stat.S_ISDIR(mode):
            try:
                os.mkdir(last, stat.S_IMODE(mode), dir_fd=at)
            except FileExistsError:
                pass
            return
        passing = f".caisson-{last[:200]}"
        _delete(at, passing)
        status = os.lstat(source)
        if stat.S_ISLNK(mode):
            os.symlink(os.readlink(source), passing, dir_fd=at)  # noqa: PTH115
            os.chown(passing, status.st_uid, status.st_gid, dir_fd=at, follow_symlinks=False)
        elif stat.S_ISREG(mode):
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            with open(os.open(passing, flags, 0o600, dir_fd=at), "wb") as copy, open(source, "rb") as file:  # noqa: PTH123
                copy.write(file.read(MAX_BYTES + 1))
                os.fchown(copy.fileno(), status.st_uid, status.st_gid)
                os.fchmod(copy.fileno(), stat.S_IMODE(mode))
        else:
            return  # a socket, or the like: not found in a config map
        os.rename(passing, last, src_dir_fd=at, dst_dir_fd=at)
    finally:
        os.close(at)


def _delete(root: int, name: str) -> None:
    parent, _, last = name.rpartition("/")
    try:
        at = syscalls.openat2(root, parent or ".", os.O_PATH | os.O_DIRECTORY, resolve=_BENEATH)
    except OSError:
        return  # removed with its directory
    try:
        os.unlink(last, dir_fd=at)
    except IsADirectoryError:
        shutil.rmtree(last, ignore_errors=True, dir_fd=at)
    except FileNotFoundError:
        pass
    finally:
        os.close(at)


_BENEATH = syscalls.RESOLVE_BENEATH | syscalls.RESOLVE_NO_SYMLINKS
