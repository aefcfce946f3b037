"""The namespaces that all containers of a sandbox share: IPC and UTS, held by bind mounts while nobody is in them.

Source: namespaces(7), "The /proc/[pid]/ns/ directory".
"""

from __future__ import annotations

import os
import threading

from agent import syscalls

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

CLONE_NEWUTS, CLONE_NEWIPC = 0x04000000, 0x08000000
SHARED = {"ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS}


class SharedNamespaces:
    """IPC and UTS namespaces, each a file to join by its path."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.paths = {kind: str(directory / kind) for kind in SHARED}

    def make(self, hostname: str) -> None:
        """Make them.  Raises OSError; nothing is left then."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        failures: list[BaseException] = []
        # A thread has these namespaces to itself (unshare(2)), and leaves the agent's others alone.
        thread = threading.Thread(target=self._unshare, args=(hostname, failures))
        thread.start()
        thread.join()
        if failures:
            self.release()
            raise failures[0]

    def _unshare(self, hostname: str, failures: list[BaseException]) -> None:
        try:
            syscalls.unshare(CLONE_NEWIPC | CLONE_NEWUTS)
            if hostname:
                import socket

                socket.sethostname(hostname)
            for kind, path in self.paths.items():
                os.close(os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
                syscalls.mount(f"/proc/thread-self/ns/{kind}", path, None, syscalls.MS_BIND)
        except OSError as error:
            failures.append(error)

    def release(self) -> None:
        """Let go of them; containers that are in them stay in them."""
        for path in self.paths.values():
            try:
                while True:  # an agent that was killed may have left one below
                    syscalls.umount2(path, syscalls.MNT_DETACH)
            except OSError:
                pass  # there is none (any more)
            try:
                os.unlink(path)  # noqa: PTH108 - no pathlib at start
            except FileNotFoundError:
                pass
        if self._directory.is_dir():
            self._directory.rmdir()
