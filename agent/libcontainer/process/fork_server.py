"""The fork server: a resident nsexec that clones itself for each process, instead of a spawn (agent/nsexec/server.c).

It saves an execve and, for a process with a cgroup, a stage of nsexec.  The server runs nothing of a container, and has
no descriptors of it between two requests.
"""

from __future__ import annotations

import os
from array import array

from caisson.agent.libcontainer.process.channel import kill

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Mapping

    from caisson.agent.libcontainer.process.children import Children
    from caisson.agent.libcontainer.process.nsexec import Nsexec
else:
    import _socket as socket

FIRST_PASSED = 6  # the number of the first descriptor after stdio, in the new process


class ForkServer:
    """The fork server, which is started with the first request, and again if it has exited."""

    def __init__(self, nsexec: Nsexec, children: Children) -> None:
        self._nsexec = nsexec
        self._children = children
        self._control: socket.socket | None = None
        self.pid = self._pidfd = -1

    def request(
        self, stdio: tuple[int, int, int] | None, passed: Mapping[str, int], settings: Mapping[str, str]
    ) -> None:
        """Request a process.

        `stdio` None is /dev/null; `passed` are its descriptors by environment variable, `settings` its other variables.
        The server announces the process on its init socket.  Raises OSError.
        """
        numbers = {name: str(FIRST_PASSED + index) for index, name in enumerate(passed)}
        text = b"".join(f"{name}={value}\0".encode() for name, value in {**numbers, **settings}.items())
        null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC) if stdio is None else -1
        try:
            fds = array("i", [*(stdio or (null,) * 3), *passed.values()])
            rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)]
            try:
                self._running().sendmsg([text], rights)
            except (BrokenPipeError, ConnectionResetError):  # it has exited
                self.close()
                self._running().sendmsg([text], rights)
        finally:
            if null >= 0:
                os.close(null)

    def _running(self) -> socket.socket:
        if self._control is None:
            control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            control.setblocking(False)
            try:
                self.pid = self._nsexec.spawn(None, [theirs.fileno()], {"_CAISSON_SERVER": str(theirs.fileno())})
            except OSError:
                control.close()
                raise
            finally:
                theirs.close()
            self._children.claim(self.pid)  # so that its exit is not taken for another process's
            self._pidfd = os.pidfd_open(self.pid)
            self._control = control
        return self._control

    def close(self) -> None:
        """Let it exit, once it has carried out all requests.  Idempotent."""
        if self._control is not None:
            self._control.close()
            self._control = None
            os.close(self._pidfd)

    def kill(self) -> None:
        """Kill it; requests under way fail.  Idempotent."""
        if self._control is not None:
            kill(self._pidfd)
            self.close()
