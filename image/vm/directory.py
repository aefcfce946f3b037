"""A VM is a directory: its sockets, its console and vm.json, for as long as its supervisor lives.

<run>/<name>/vm.json       what it is
             image.json    what runs in it
             lock          held by the supervisor: a directory whose lock is free is stale
             console.log   what the guest printed
             agent.sock    any gRPC client dials the agent here
             vsock.sock    CONNECT <port> reaches any other port of the guest; vsock.sock_<port> is the way back
             qmp.sock      QEMU's monitor
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from image.vm.errors import VMError

#: sockaddr_un holds 107 bytes and a terminating NUL (unix(7)); `vsock.sock_4294967295` is the longest of ours.
LONGEST_SOCKET = 107
LONGEST_NAME = len("/vsock.sock_4294967295")


def run_root() -> Path:
    """Where VMs are: ``$CAISSON_RUN``, ``$XDG_RUNTIME_DIR/caisson``, ``/run/caisson`` for root, else below /tmp."""
    if chosen := os.environ.get("CAISSON_RUN"):
        return Path(chosen).resolve()
    if base := os.environ.get("XDG_RUNTIME_DIR"):
        return Path(base) / "caisson"
    return Path("/run/caisson") if os.geteuid() == 0 else Path(f"/tmp/caisson-{os.geteuid()}")


def make_run_root() -> Path:
    """The same, made if need be, for nobody but its owner.  Raises VMError when it is somebody else's."""
    root = run_root()
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        state = root.stat()
    except OSError as error:
        raise VMError(f"{root} cannot be made: {error}; CAISSON_RUN names another place") from error
    if state.st_uid != os.geteuid():
        raise VMError(f"{root} belongs to somebody else; CAISSON_RUN names another place")
    return root


class VMDirectory:
    """The directory of one VM."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.console = path / "console.log"
        self.agent_socket = path / "agent.sock"
        self.vsock_socket = path / "vsock.sock"
        self.qmp_socket = path / "qmp.sock"
        self.qemu_log = path / "qemu.log"
        self.log = path / "supervisor.log"
        self._lock = path / "lock"
        self._json = path / "vm.json"

    @classmethod
    def of(cls, name: str) -> VMDirectory:
        """The directory of the VM of this name.  Raises VMError for a name that cannot be one."""
        if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
            raise VMError(f"a VM's name is made of letters, digits, '_', '.' and '-', and {name!r} is not")
        path = run_root() / name
        if len(os.fsencode(path)) + LONGEST_NAME > LONGEST_SOCKET:
            raise VMError(f"{path} is too long for the paths of sockets; a shorter name, or CAISSON_RUN, helps")
        return cls(path)

    def create(self) -> IO[str]:
        """Make the directory, in place of a stale one; returns the held lock.

        Raises VMError when a VM of this name lives.
        """
        while True:
            try:
                self.path.mkdir(mode=0o700)
                lock = self._lock.open("w")
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Between mkdir and flock somebody may have cleaned it up, taking it for a stale one.
                if os.fstat(lock.fileno()).st_nlink:
                    return lock
                lock.close()
            except FileExistsError:
                if self.alive():
                    raise VMError(
                        f"there is a VM {self.name!r} already; stop it: invoke stop-vm --name {self.name}"
                    ) from None
                self.remove()
            except FileNotFoundError:
                continue

    def alive(self) -> bool:
        """Whether a supervisor holds it."""
        try:
            lock = self._lock.open()
        except FileNotFoundError:
            return False
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            return False

    def remove(self) -> None:
        """Remove it with all that is in it."""
        shutil.rmtree(self.path, ignore_errors=True)

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


def living() -> Iterator[VMDirectory]:
    """The directories of VMs that live, by name; stale ones are removed on the way."""
    root = run_root()
    for path in sorted(root.iterdir()) if root.is_dir() else ():
        directory = VMDirectory(path)
        if directory.alive():
            yield directory
        elif (path / "lock").exists():
            directory.remove()
