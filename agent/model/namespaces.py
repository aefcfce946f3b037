"""The namespaces that all containers of a sandbox share: IPC and UTS, kept alive by bind mounts, and at the host's
request a pid namespace with an init that reaps.

Source: namespaces(7), "The /proc/[pid]/ns/ directory"; pid_namespaces(7).
"""

from __future__ import annotations

import os
import signal
import threading

from caisson.agent.base import syscalls
from caisson.agent.base.errors import ProcessExited
from caisson.agent.model.reaper import Child

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

    from caisson.agent.libcontainer.process.launcher import ProcessLauncher

SHARED = ("ipc", "uts")


class SharedNamespaces:
    """IPC and UTS namespaces, optionally a pid namespace, each a file to join by path."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self.paths = {kind: str(directory / kind) for kind in SHARED}
        self.procfs: str | None = None  # a mount of the shared pid namespace's procfs, if there is one
        self._pause: Child | None = None

    async def make(self, hostname: str, pids: ProcessLauncher | None = None) -> None:
        """Create them; with `pids` also the pid namespace.  Raises OSError or LaunchError; nothing is left then."""
        self._directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        failures: list[BaseException] = []
        # Only this thread gets the new namespaces (unshare(2)); the agent's other threads are not affected.
        thread = threading.Thread(target=self._unshare, args=(hostname, failures))
        thread.start()
        thread.join()
        try:
            if failures:
                raise failures[0]
            if pids is not None:
                await self.add_pid_namespace(pids)
        except BaseException:
            await self.release()
            raise

    def _unshare(self, hostname: str, failures: list[BaseException]) -> None:
        try:
            syscalls.unshare(syscalls.CLONE_NEWIPC | syscalls.CLONE_NEWUTS)
            if hostname:
                import socket

                socket.sethostname(hostname)
            for kind, path in self.paths.items():
                _hold(f"/proc/thread-self/ns/{kind}", path)
        except OSError as error:
            failures.append(error)

    async def add_pid_namespace(self, launcher: ProcessLauncher) -> None:
        """Create the pid namespace, with an init that reaps.  Raises OSError or LaunchError."""
        procfs, root = str(self._directory / "proc"), str(self._directory / "empty")
        for path in (procfs, root):
            os.makedirs(path, 0o755, exist_ok=True)  # noqa: PTH103 - no pathlib at start
        pause = await launcher.pause(procfs, root, self.paths)
        assert isinstance(pause, Child)  # the launcher's children are the reaper's
        self._pause, self.procfs = pause, procfs
        path = str(self._directory / "pid")
        _hold(f"/proc/{pause.pid}/ns/pid", path)
        self.paths["pid"] = path

    async def release(self) -> None:
        """Close them, and kill the processes left in a shared pid namespace; containers stay in the others."""
        if self._pause is not None:
            try:
                self._pause.signal(signal.SIGKILL)
            except ProcessExited:
                pass
            await self._pause.wait()  # it exits once all others in there have been reaped
            self._pause = None
        if not self._directory.is_dir():
            return
        for path in map(str, self._directory.iterdir()):  # an agent that was killed may have left some, too
            try:
                while True:
                    syscalls.umount2(path, syscalls.MNT_DETACH)
            except OSError:
                pass  # not mounted (any more)
            os.rmdir(path) if os.path.isdir(path) else os.unlink(path)  # noqa: PTH106, PTH108, PTH112
        self._directory.rmdir()


def _hold(namespace: str, path: str) -> None:
    """Keep a namespace by a mount of its file."""
    os.close(os.open(path, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o600))
    syscalls.mount(namespace, path, None, syscalls.MS_BIND)
