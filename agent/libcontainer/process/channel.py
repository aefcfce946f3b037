"""What the agent and one nsexec say to each other, from the spawn to "ready", all on the event loop.

Pids and a pidfd come on the init socket, readiness and errors on the sync socket, the terminal on the console socket,
lines for the log on the log pipe.  The other side runs before any of the container's own programs, but paths and errors
in it come from images: everything is bounded and nothing of it is trusted to be well-formed.
"""

from __future__ import annotations

import array
import json
import os
import signal
import socket
import sys

from caisson.agent.libcontainer.errors import LaunchError, launch_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

PACKET_MAX = 16384
LINE_MAX = 8192
SCM_CREDENTIALS = 2  # unix(7): struct ucred, filled in by the kernel
INT_SIZE = array.array("i").itemsize


class SetupChannel:
    """Both ends of the channels to one nsexec.

    `pids` is called with (stage 1 or 0, stage 2 or 0) for each that is made.  `at_hooks` is done when nsexec waits for
    the agent's hooks to have run, and for `release_init`; `ready` when the process is set up, `running` when one
    without a fifo was told to start, `ended` when nobody holds the sync socket any more: after execve, or after the end of all
    stages.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        *,
        terminal: bool,
        pids: Callable[[int, int], None],
        log: Callable[[str, str], None],
    ) -> None:
        self._loop = loop
        self._pids = pids
        self._log = log
        self._line = b""
        self._unsent = memoryview(b"")
        self.pidfd = self._pidfd1 = -1
        self._makers: set[int] = set()  # stages outside of the container: nobody else says who was made
        self.console = -1
        self._killed = False
        self.error: LaunchError | None = None
        self.ready: asyncio.Future[None] = loop.create_future()
        self.at_hooks: asyncio.Future[None] = loop.create_future()
        self.running: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()
        self._child_ends: list[socket.socket | int] = []
        self._init = self._pair(socket.SOCK_STREAM)
        # A process that is born into a namespace with others has this socket for a moment, and they may take it then.
        self._init.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sync = self._pair(socket.SOCK_SEQPACKET)
        self._console = self._pair(socket.SOCK_STREAM) if terminal else None
        self._log_fd, log_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(log_end, True)
        self._child_ends.append(log_end)
        fds = [end if isinstance(end, int) else end.fileno() for end in self._child_ends]
        self.child_fds = dict(
            zip(
                ["_LIBCONTAINER_INITPIPE", "_LIBCONTAINER_SYNCPIPE"]
                + (["_LIBCONTAINER_CONSOLE"] if terminal else [])
                + ["_LIBCONTAINER_LOGPIPE"],
                fds,
                strict=True,
            )
        )

    def _pair(self, kind: socket.SocketKind) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        ours.setblocking(False)
        self._child_ends.append(theirs)
        return ours

    def send(self, messages: bytes) -> None:
        """Put as much as fits into the init socket; `listen` sends the rest.  To be called before the spawn."""
        self._unsent = memoryview(messages)
        self._send()

    def listen(self, pid: int) -> None:
        """To be called right after the spawn: close the other side's ends and follow what it says."""
        self._makers.add(pid)
        self.close_child_ends()
        self._loop.add_reader(self._init.fileno(), self._on_init)
        self._loop.add_reader(self._sync.fileno(), self._on_sync)
        self._loop.add_reader(self._log_fd, self._on_log)
        if self._unsent:
            self._loop.add_writer(self._init.fileno(), self._send)

    def close_child_ends(self) -> None:
        """Close the ends that were for nsexec."""
        for end in self._child_ends:
            os.close(end) if isinstance(end, int) else end.close()
        self._child_ends.clear()

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._init.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it is gone; the sync socket tells why
            self._unsent = memoryview(b"")
        if not self._unsent:
            self._loop.remove_writer(self._init.fileno())

    def _on_init(self) -> None:
        """Messages as they were sent: those with descriptors are not merged (unix(7)).  Two are expected at most."""
        for _ in range(4):  # and whoever sends more must not keep the loop from others
            data, fds, sender = _receive(self._init, 256)
            if data is None:
                return
            if data and sender in self._makers and len(fds) == 1:
                self._made(_object(data), fds)
            for fd in fds:
                os.close(fd)
            if not data or self.pidfd >= 0:
                self._loop.remove_reader(self._init.fileno())
                return

    def _made(self, found: dict[str, object], fds: list[int]) -> None:
        """A maker's news: who was made last, and its pidfd, which is taken out of `fds`."""
        stage1, stage2 = found.get("stage1_pid"), found.get("stage2_pid")
        if not isinstance(stage1, int) or not isinstance(stage2, int) or stage1 < 0 or stage2 < 0:
            return
        if stage2 > 0:
            self.pidfd = fds.pop()
        elif stage1 > 0 and self._pidfd1 < 0:
            self._pidfd1 = fds.pop()
            self._makers.add(stage1)
        else:
            return
        if self._killed:
            self.kill_stages()
        self._pids(stage1, stage2)

    def _on_sync(self) -> None:
        try:
            packet = self._sync.recv(PACKET_MAX)
        except BlockingIOError:
            return
        except OSError:
            packet = b""
        if packet:
            found = _object(packet)
            steps = {"procReady": self.ready, "procHooks": self.at_hooks, "procRun": self.running}
            step = steps.get(_text(found.get("type")))
            if step is not None:
                self._settle()
                if not step.done():
                    step.set_result(None)
            elif found.get("type") == "procError" and self.error is None:
                where, path, why = (_text(found.get(key)) for key in ("step", "path", "why"))
                errno = found.get("errno")
                self.error = launch_error(where, path, errno if isinstance(errno, int) else 0, why)
            return
        self._loop.remove_reader(self._sync.fileno())
        self._settle()
        if not self.ended.done():
            self.ended.set_result(None)

    def _settle(self) -> None:
        """Read what was sent before the packet just seen: the loop may not have got to it."""
        if self.pidfd < 0:
            self._on_init()
        if self._console is not None and self.console < 0:
            _, fds, _ = _receive(self._console, 16)
            self.console = fds.pop(0) if fds else -1
            for fd in fds:
                os.close(fd)
        self._on_log()

    def _on_log(self) -> None:
        if self._log_fd < 0:
            return
        try:
            data = os.read(self._log_fd, LINE_MAX)
        except BlockingIOError:
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            self._log_line(line)
        if not data or len(self._line) > LINE_MAX:
            self._log_line(self._line)
            self._close_log()

    def _log_line(self, line: bytes) -> None:
        if line:
            found = _object(line)
            self._log(_text(found.get("level")) or "debug", _text(found.get("msg")) or repr(line[:200]))

    def _close_log(self) -> None:
        if self._log_fd >= 0:
            self._loop.remove_reader(self._log_fd)
            os.close(self._log_fd)
            self._log_fd = -1

    def kill_stages(self) -> None:
        """Kill stages 1 and 2, now or as soon as they are known."""
        self._killed = True
        for pidfd in (self._pidfd1, self.pidfd):
            if pidfd >= 0:
                kill(pidfd)

    def release_init(self) -> None:
        """The agent's hooks have run; or the process is to be started, that has no fifo to wait on."""
        try:
            self._sync.send(b"1")
        except OSError:  # it is gone; `ended` tells
            pass

    def take_console(self) -> int | None:
        """The terminal's master, from now on the caller's; None if there is none."""
        fd, self.console = self.console, -1
        return None if fd < 0 else fd

    def close_setup(self) -> None:
        """Close what is of no use once the process is ready: all but the sync socket and the pidfd."""
        self._loop.remove_reader(self._init.fileno())
        self._loop.remove_writer(self._init.fileno())
        self._init.close()
        if self._console is not None:
            self._console.close()
        self._close_log()

    def close(self) -> None:
        """Close everything.  Idempotent."""
        self.close_child_ends()
        if self._sync.fileno() >= 0:
            self._loop.remove_reader(self._sync.fileno())
            self._sync.close()
        if self._init.fileno() >= 0:
            self.close_setup()
        for fd in (self.pidfd, self._pidfd1, self.console):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self._pidfd1 = self.console = -1
        for future in (self.at_hooks, self.ready, self.running, self.ended):
            future.cancel()


def kill(pidfd: int) -> None:
    """SIGKILL to a process that may be gone."""
    try:
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _receive(sock: socket.socket, size: int) -> tuple[bytes | None, list[int], int]:
    """Data, descriptors and the sender's pid if the socket wants it; None when there is nothing yet."""
    room = socket.CMSG_SPACE(4 * INT_SIZE) + socket.CMSG_SPACE(3 * INT_SIZE)
    try:
        data, ancillary, _, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None, [], 0
    except OSError:
        return b"", [], 0
    fds, sender = array.array("i"), 0
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % INT_SIZE])
        elif level == socket.SOL_SOCKET and kind == SCM_CREDENTIALS:
            sender = int.from_bytes(payload[:INT_SIZE], sys.byteorder)
    return data, list(fds), sender


def _object(data: bytes) -> dict[str, object]:
    """A JSON object, empty if it is not one.  Bytes of file names that are not UTF-8 survive."""
    try:
        found = json.loads(data.decode("utf-8", "surrogateescape"))
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
