"""A VM is a directory: its sockets, its console and vm.json, for as long as its supervisor lives.

<run>/<name>/vm.json       what it is
             image.json    what runs in it
             lock          held by the supervisor: a directory whose lock is free is stale
             console.log   what the guest printed
             firmware.log  what the firmware printed, if that was asked for
             qemu.log      what QEMU and the vsock device complained about
             agent.sock    any gRPC client dials the agent here
             vsock.sock    CONNECT <port> reaches any other port of the guest; vsock.sock_<port> is the way back
             qmp.sock      QEMU's monitor
             control.sock  the supervisor's, for what it does while the VM runs (supervisor.py)
             fsN.sock      a virtiofsd's (virtiofs.py)
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
from typing import IO, Any

from caisson.image.parent_death import cleaned_up_if_killed
from caisson.image.vm.errors import VMError

#: sockaddr_un holds 107 bytes and a terminating NUL (unix(7)); `vsock.sock_4294967295` is the longest of ours.
MAX_SOCKET_PATH = 107
MAX_SOCKET_NAME = len("/vsock.sock_4294967295")


def run_root() -> Path:
    """Where VMs are: ``$CAISSON_RUN``, ``$XDG_RUNTIME_DIR/caisson``, ``/run/caisson`` for root, else below /tmp."""
    if chosen := os.environ.get("CAISSON_RUN"):
        return Path(chosen).resolve()
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "caisson"
    return Path("/run/caisson") if os.geteuid() == 0 else Path(f"/tmp/caisson-{os.geteuid()}")


def owned_run_root(make: bool = False) -> Path | None:
    """The same, or None while there is none; ``make`` makes it, for nobody but its owner.

    Raises VMError when others may write in it: they could put sockets of theirs where an agent is looked for.
    """
    root = run_root()
    try:
        if make:
            root.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = root.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise VMError(f"{root} cannot be used: {error.strerror}; CAISSON_RUN names another place") from error
    if not stat.S_ISDIR(state.st_mode):
        raise VMError(f"{root} is not a directory; CAISSON_RUN names another place")
    if state.st_uid != os.geteuid():
        raise VMError(f"{root} belongs to somebody else; CAISSON_RUN names another place")
    if state.st_mode & 0o022:
        raise VMError(f"{root} can be written by others; run: chmod go-w {root}")
    return root


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """Directories of VMs are made and removed in here, one at a time in all processes.

    So a directory without a held lock, seen in here, is stale: its maker is neither at work nor alive.
    """
    descriptor = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
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
        """The directory of the VM of this name.  Raises VMError for a name that cannot be one."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise VMError(f"a VM's name is made of letters, digits, '_', '.' and '-', and {name!r} is not")
        path = run_root() / name
        if len(os.fsencode(path)) + MAX_SOCKET_NAME > MAX_SOCKET_PATH:
            raise VMError(f"{path} is too long for the paths of sockets; a shorter name, or CAISSON_RUN, helps")
        return cls(path)

    def create(self) -> IO[str]:
        """Make the directory, in place of a stale one; returns the held lock.

        Raises VMError when a VM of this name lives.
        """
        with _alone(self.path.parent):
            if self.alive():
                raise VMError(f"there is a VM {self.name!r} already; stop it: caisson stop-vm {self.name}")
            if self._lock.exists():
                self._empty()
            try:
                self.path.mkdir(mode=0o700)
            except FileExistsError:
                raise VMError(f"{self.path} is in the way, and is not a VM's") from None
            except OSError as error:
                raise VMError(f"{self.path} cannot be made: {error.strerror}") from error
            lock = self._lock.open("w")
            fcntl.flock(lock, fcntl.LOCK_EX)  # at most it waits for somebody who looks whether it is held
            return lock

    def alive(self) -> bool:
        """Whether a supervisor holds it."""
        try:
            lock = self._lock.open()
        except (FileNotFoundError, NotADirectoryError):
            return False
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def remove(self) -> None:
        """Remove it with all that is in it: for the holder of its lock."""
        with _alone(self.path.parent):
            self._empty()

    def remove_stale(self) -> bool:
        """Remove it unless a supervisor holds it; says whether it did."""
        with _alone(self.path.parent):
            if self.alive():
                return False
            self._empty()
            return True

    def _empty(self) -> None:
        # The lock goes last: what is left by one who is killed on the way can be told from somebody else's directory.
        for entry in self.path.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            elif entry != self._lock:
                entry.unlink(missing_ok=True)
        self._lock.unlink(missing_ok=True)
        self.path.rmdir()

    def read(self) -> dict[str, Any]:
        """vm.json, or an empty document while there is none yet."""
        try:
            return dict(json.loads(self._json.read_text()))
        except FileNotFoundError:
            return {}

    def write(self, document: dict[str, Any]) -> None:
        """Replace vm.json: a reader sees the old one or the new one."""
        new = self._json.with_suffix(".new")
        new.write_text(json.dumps(document, indent=2) + "\n")
        new.replace(self._json)

    def console_tail(self, lines: int = 15) -> str:
        """The last lines that the guest printed, without control characters."""
        return _tail(self.console, lines)

    def console_silence(self) -> str:
        """Since when the guest has printed nothing, in words."""
        try:
            state = self.console.stat()
        except FileNotFoundError:
            return "the guest printed nothing"
        if state.st_size == 0:
            return "the guest printed nothing"
        return f"the guest last printed something {max(0.0, time.time() - state.st_mtime):.0f} s ago"

    def qemu_tail(self, lines: int = 5) -> str:
        """The last lines that QEMU and its helpers wrote to stderr."""
        return _tail(self.qemu_log, lines)


def _tail(file: Path, lines: int) -> str:
    try:
        with file.open("rb") as stream:
            stream.seek(max(0, os.fstat(stream.fileno()).st_size - 16384))
            text = stream.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\x1bc", "", text)
    kept = ["".join(c for c in line if c.isprintable() or c == "\t") for line in text.splitlines()]
    return "\n".join([line for line in kept if line.strip()][-lines:])


def running_vms() -> Iterator[VMDirectory]:
    """The directories of VMs that live, by name; stale ones are removed on the way.  Raises VMError."""
    root = owned_run_root()
    for path in sorted(root.iterdir()) if root else ():
        directory = VMDirectory(path)
        if directory.alive():
            yield directory
        elif (path / "lock").exists():
            directory.remove_stale()


#: Arguments: the VM's directory, the run root.  The kernel may close the pipe of a dying process before its lock, hence
#: the first flock(1).  The others hold the lock under which directories are made and removed, and look again: what is
#: locked by now belongs to a new VM of the same name, and what is neither locked nor empty is somebody else's.
REMOVE = """
[ -e "$1/lock" ] || exec flock -- "$2" rmdir -- "$1"
flock --wait 2 -- "$1/lock" true && exec flock -- "$2" flock --nonblock -- "$1/lock" rm -rf -- "$1"
"""


def janitor(directory: VMDirectory) -> contextlib.AbstractContextManager[None]:
    """Have a VM's directory, and this process's group, cleaned up should this process be killed in the block.

    To be entered before the directory is made, so that there is no moment at which a kill leaves something behind.
    """
    return cleaned_up_if_killed(REMOVE, [str(directory.path), str(directory.path.parent)])
