"""A VM is a directory: its sockets, its console and vm.json, for as long as its supervisor lives.

<run>/<name>/vm.json       its configuration and state
             image.json    the manifest of its image
             lock          held by the supervisor: a directory whose lock is free is stale; its text is our mark
             console.log   the guest's output, the last MiBs of it (logs.py)
             firmware.log  the firmware's messages, on request
             qemu.log      messages of QEMU and the vsock device
             agent.sock    any gRPC client dials the agent here
             vsock.sock    CONNECT <port> reaches any other port of the guest; vsock.sock_<port> is the way back
             qmp.sock      QEMU's monitor
             control.sock  the supervisor's, for requests while the VM runs (supervisor.py)
             fsN.sock      a virtiofsd's (hotplug/virtiofs.py)

Only directories of this user with our mark are ever removed, and only when creating a VM of the same name, when
stopping one, or by the janitor of a killed supervisor: reading removes nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from caisson.image.vm.errors import InvalidOption, VMError
from caisson.image.vm.runroot import owned_run_root, run_root
from caisson.proto.contract import VERSION, VM_FORMAT
from caisson.proto.foreign_text import printable

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO, Any

#: sockaddr_un holds 107 bytes and a terminating NUL (unix(7)); `vsock.sock_4294967295` is the longest of ours.
MAX_SOCKET_PATH = 107
MAX_SOCKET_NAME = len("/vsock.sock_4294967295")

#: The contents of a lock file, so that a foreign directory with a file of this name is not mistaken for ours.
MARK = "a VM of Caisson's, format 1\n"

#: Maximum bytes of vm.json, of a log's end to read, and characters of one of its lines.
MAX_DOCUMENT = 4 << 20
MAX_TAIL = 16384
QEMU_LINES = 5  # of its messages in an error

#: A new lock on its way into a new directory.  One name for each VM: what a kill leaves is replaced by the next.
NEW_LOCK = ".lock-"


@contextlib.contextmanager
def _exclusive(root: Path) -> Iterator[int]:
    """Create and remove directories of VMs exclusively, across all processes; yields the run root's descriptor.

    So a directory without a held lock, seen in here, is stale: its creator is no longer running.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield descriptor
    finally:
        os.close(descriptor)


class VMDirectory:
    """The directory of one VM."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.console = path / "console.log"
        self.firmware = path / "firmware.log"
        self.agent_socket = path / "agent.sock"
        self.vsock_socket = path / "vsock.sock"
        self.qmp_socket = path / "qmp.sock"
        self.control_socket = path / "control.sock"
        self.qemu_log = path / "qemu.log"
        self._lock = path / "lock"
        self._json = path / "vm.json"

    @classmethod
    def of(cls, name: str) -> VMDirectory:
        """Return the directory of the VM of this name.  Raises VMError for an invalid name."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise InvalidOption(f"VM {name!r}: is not a name; give letters, digits, '_', '.' and '-'")
        path = (owned_run_root() or run_root()) / name
        if len(os.fsencode(path)) + MAX_SOCKET_NAME > MAX_SOCKET_PATH:
            raise VMError(f"{path}: is too long for a socket's path; choose a shorter name, or set CAISSON_RUN")
        return cls(path)

    def refuse_running(self) -> None:
        """Raise VMError if a VM of this name is running."""
        if self.is_running():
            raise VMError(f"VM {self.name!r}: is running already; stop it: caisson stop-vm {self.name}")

    def create(self) -> IO[str]:
        """Create the directory, replacing a stale one; returns the held lock.

        Raises VMError if a VM of this name is running, or the directory is not ours.
        """
        with _exclusive(self.path.parent) as root:
            self.refuse_running()
            self._remove(root)
            try:
                lock = self._new_lock(root)
                os.mkdir(self.name, mode=0o700, dir_fd=root)
                os.rename(NEW_LOCK + self.name, f"{self.name}/lock", src_dir_fd=root, dst_dir_fd=root)
            except FileExistsError:
                raise VMError(f"{self.path}: is in the way, and is not a VM's directory; choose another name") from None
            except OSError as error:
                raise VMError(f"{self.path} cannot be made: {error.strerror}") from error
            return lock

    def _new_lock(self, root: int) -> IO[str]:
        """Create a lock that is held and has our mark before it gets its name."""
        name = NEW_LOCK + self.name
        with contextlib.suppress(FileNotFoundError):
            os.unlink(name, dir_fd=root)
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        lock = os.fdopen(os.open(name, flags, 0o600, dir_fd=root), "w")
        lock.write(MARK)
        lock.flush()
        fcntl.flock(lock, fcntl.LOCK_EX)
        return lock

    def is_running(self) -> bool:
        """Return whether a supervisor holds the lock."""
        try:
            lock = os.open(self._lock, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError:
            return False
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        finally:
            os.close(lock)
        return False

    def remove(self) -> None:
        """Remove it with its contents; the caller holds its lock.  Raises VMError if it is not ours."""
        with _exclusive(self.path.parent) as root:
            self._remove(root)

    def _remove(self, root: int) -> None:
        """Remove the directory, if it has our mark; beneath ``root``, without following links.  Raises VMError if
        not.
        """
        try:
            directory = os.open(self.name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=root)
        except FileNotFoundError:
            return
        except OSError:
            raise VMError(f"{self.path}: is in the way, and is not a VM's directory; choose another name") from None
        try:
            if not _is_ours(directory):
                raise VMError(f"{self.path}: is in the way, and is not a VM's directory; choose another name")
            # The lock goes last: after a kill half-way, the rest still has the mark.
            for entry in os.scandir(directory):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.name, ignore_errors=True, dir_fd=directory)
                elif entry.name != "lock":
                    os.unlink(entry.name, dir_fd=directory)
            os.unlink("lock", dir_fd=directory)
            os.rmdir(self.name, dir_fd=root)
        finally:
            os.close(directory)

    def read(self) -> dict[str, Any]:
        """Return vm.json; an empty document if there is none yet.  Raises VMError if it cannot be read."""
        try:
            with self._json.open() as stream:
                return dict(json.loads(stream.read(MAX_DOCUMENT)))
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError, TypeError) as error:
            raise VMError(f"{self._json} cannot be read: {error}") from error

    def write(self, document: dict[str, Any]) -> None:
        """Replace vm.json: a reader sees the old one or the new one."""
        new = self._json.with_suffix(".new")
        # QEMU can write to this directory: no link of a guest that broke out is followed.
        with open(new, "w", opener=lambda path, flags: os.open(path, flags | os.O_NOFOLLOW, 0o600)) as stream:
            stream.write(json.dumps(document, indent=2) + "\n")
        new.replace(self._json)

    def console_tail(self, lines: int = 15) -> str:
        """Return the last lines that the guest printed, without control characters."""
        return _tail(self.console, lines)

    def console_silence(self) -> str:
        """Describe for how long the guest has printed nothing."""
        try:
            state = self.console.stat()
        except FileNotFoundError:
            return "the guest printed nothing"
        if state.st_size == 0:
            return "the guest printed nothing"
        return f"the guest last printed something {max(0.0, time.time() - state.st_mtime):.0f} s ago"

    def qemu_tail(self) -> str:
        """Return the last lines that QEMU and its helpers wrote to stderr."""
        return _tail(self.qemu_log, QEMU_LINES)


def running_vms() -> Iterator[VMDirectory]:
    """Yield the directories of running VMs, by name.  Raises VMError."""
    root = owned_run_root()
    for path in sorted(root.iterdir()) if root else ():
        directory = VMDirectory(path)
        if directory.is_running():
            yield directory


def find_running(name: str) -> tuple[VMDirectory, dict[str, Any]] | None:
    """Return the directory of the running VM of this name and its vm.json; None if there is none.

    Raises VMError for an invalid name, and for a VM of an incompatible version of Caisson.
    """
    directory = VMDirectory.of(name)
    if owned_run_root() is None or not directory.is_running():
        return None
    info = directory.read()
    if info and info.get("format") != VM_FORMAT:
        raise VMError(
            f"VM {name!r}: was started by Caisson {info.get('version', '0.1')}, this is {VERSION}; use that one, or "
            f"stop its supervisor: kill {info.get('pids', {}).get('supervisor', 'PID')}"
        )
    return (directory, info) if info else None


def _is_ours(directory: int) -> bool:
    """Return whether an open directory belongs to this user and contains this user's lock file with our mark."""
    if os.fstat(directory).st_uid != os.geteuid():
        return False
    try:
        lock = os.open("lock", os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
    except OSError:
        return False
    try:
        state = os.fstat(lock)
        mark = MARK.encode()
        return stat.S_ISREG(state.st_mode) and state.st_uid == os.geteuid() and os.read(lock, 100) == mark
    finally:
        os.close(lock)


def _tail(file: Path, lines: int) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - MAX_TAIL))
            text = stream.read(MAX_TAIL).lstrip(b"\0").decode(errors="replace")
    except OSError:
        return ""
    return "\n".join([line for line in printable(text).split("\n") if line.strip()][-lines:])


#: Arguments: the run root, the VM's name, our mark.  The kernel may close the pipe of a dying process before its lock,
#: hence the first flock(1).  The others hold the lock under which directories are made and removed, and look again:
#: what is locked by now belongs to a new VM of the same name, and what has no mark is somebody else's.  A directory
#: that is empty has just been made: its lock was on its way.
REMOVE = """
cd -P -- "$1" && [ -O . ] || exit
flock -- . flock --nonblock -- ".lock-$2" rm -f -- ".lock-$2" 2>&-
[ ! -L "$2" ] && [ -d "$2" ] && [ -O "$2" ] || exit
[ -e "$2/lock" ] || exec flock -- . rmdir -- "$2"
[ ! -L "$2/lock" ] && [ -f "$2/lock" ] && [ -O "$2/lock" ] && IFS= read -r mark <"$2/lock" && [ "$mark" = "$3" ] || exit
flock --wait 2 -- "$2/lock" true && exec flock -- . flock --nonblock -- "$2/lock" rm -rf -- "$2"
"""


def janitor(directory: VMDirectory) -> contextlib.AbstractContextManager[None]:
    """Clean up a VM's directory, and this process's group, if this process is killed in the block.

    Enter it before creating the directory, so that a kill at any time leaves nothing behind.
    """
    from caisson.image.parent_death import cleaned_up_if_killed  # late: readers start no process

    arguments = [str(directory.path.parent), directory.name, MARK.rstrip()]
    return cleaned_up_if_killed(REMOVE, arguments)
