"""The setup channel: the sockets and pipe between a runtime and one nsexec, from spawn to "ready".

Pids and pidfds arrive on the init socket, readiness and errors on the sync socket, the terminal on the console socket,
log lines on the log pipe.  The other side runs before any of the container's own programs, but paths and errors in it
come from images: everything is bounded, and nothing is trusted to be well-formed.

Nothing here blocks on I/O: the caller waits until `fileno()` is readable and calls `on_readable`.
"""

from __future__ import annotations

import os
import select
import sys

from caisson.agent.base.json import JsonError, loads
from caisson.agent.libcontainer.errors import LaunchError, launch_error

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal
    import socket
    from collections.abc import Callable

    from caisson.agent.libcontainer.waits import Waits
else:  # without the enums and selectors around them
    import _signal as signal
    import _socket as socket

PACKET_MAX = 16384
LINE_MAX = 8192
SCM_CREDENTIALS = 2  # unix(7): struct ucred, filled in by the kernel
INT_SIZE = 4
SIGKILL = 9
MESSAGES = 4  # handled per call and socket: a flood must not keep the caller from other work


class SetupChannel:
    """Our ends of the channels to one nsexec.

    `announced` is called with (stage 1 or 0, stage 2 or 0) as each stage is created.  `at_hooks`: nsexec waits for the
    runtime's hooks to have run, and for `release_init`.  `ready`: the process is set up.  `ended`: the sync socket is
    closed on the other side: after execve, after the start of an init, or after all stages have exited.  `error` is
    why.
    """

    def __init__(
        self, *, terminal: bool, announced: Callable[[int, int], None], log: Callable[[str, str], None]
    ) -> None:
        self._announced = announced
        self._log = log
        self._line = b""
        self._unsent = memoryview(b"")
        self._killed = False
        self._events = select.EPOLLIN  # that wake the caller
        self._watched: set[int] = set()
        self._makers: set[int] = set()  # stages outside the container: only these may announce pids
        self.at_hooks = self.ready = self.ended = False
        self.error: LaunchError | None = None
        self.pidfd = self.stage1_pidfd = self.console = -1
        self.listener = -1  # the number, in the process that has loaded the filter
        self._handlers: dict[int, Callable[[], None]] = {}
        self._epoll = select.epoll()
        self._child_ends: list[socket.socket | int] = []
        self._init = self._pair(socket.SOCK_STREAM)
        # A process created in a shared namespace briefly holds this socket, and others there could take it.
        self._init.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sync = self._pair(socket.SOCK_SEQPACKET)
        self._console = self._pair(socket.SOCK_STREAM) if terminal else None
        # Its few lines are read together with packets on the sync socket: they alone do not wake the caller.
        self._log_fd, log_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        os.set_blocking(log_end, True)
        self._child_ends.append(log_end)
        names = ["INITPIPE", "SYNCPIPE", *(["CONSOLE"] if terminal else []), "LOGPIPE"]
        ends = [end if isinstance(end, int) else end.fileno() for end in self._child_ends]
        #: Descriptors for nsexec, by environment variable.
        self.child_fds = {f"_LIBCONTAINER_{name}": fd for name, fd in zip(names, ends, strict=True)}

    def _pair(self, kind: int) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, kind)
        ours.setblocking(False)
        self._child_ends.append(theirs)
        return ours

    def fileno(self) -> int:
        """Return a descriptor that is readable when `on_readable` has work."""
        return self._epoll.fileno()

    def send(self, messages: bytes) -> None:
        """Write as much as fits into the init socket; the rest follows later."""
        self._unsent = memoryview(messages)
        self._send()
        if self._unsent:
            self._watch_init()

    def spawned(self, pid: int, *, until_end: bool = False) -> None:
        """Follow stage 0.  Call it right after the spawn.

        ``until_end``: the caller waits for `ended` only.  It is not woken before, and everything is read then.
        """
        self._makers.add(pid)
        self.close_child_ends()
        self._handlers = {
            self._init.fileno(): self._on_init,
            self._sync.fileno(): self._on_sync,
        }
        if until_end:
            self._events = 0  # EPOLLHUP is reported all the same (epoll_ctl(2))
        self._watch(self._sync.fileno(), self._events)
        self._watch_init()

    def _watch_init(self) -> None:
        """Wake the caller when the init socket has input that it waits for, or room for unsent messages."""
        events = self._events if self._init.fileno() in self._handlers else 0
        events |= select.EPOLLOUT if self._unsent else 0
        self._watch(self._init.fileno(), events or None)

    def _watch(self, fd: int, events: int | None) -> None:
        """Wait for events on a socket, and for its end; None ends that."""
        if events is None:
            if fd in self._watched:
                self._watched.remove(fd)
                self._epoll.unregister(fd)
        elif fd in self._watched:
            self._epoll.modify(fd, events)
        else:
            self._watched.add(fd)
            self._epoll.register(fd, events)

    def close_child_ends(self) -> None:
        """Close nsexec's ends."""
        for end in self._child_ends:
            os.close(end) if isinstance(end, int) else end.close()
        self._child_ends.clear()

    def on_readable(self) -> None:
        """Read what has arrived, send what fits."""
        for fd, events in self._epoll.poll(0):
            if events & select.EPOLLOUT:
                self._send()
                if not self._unsent:
                    self._watch_init()
            if events & ~select.EPOLLOUT and fd in self._handlers:
                self._handlers[fd]()

    async def follow(self, waits: Waits, reached: Callable[[], bool], seconds: float | None) -> bool:
        """Drive the channel until a state is reached; False on timeout (`seconds`)."""

        def step() -> bool:
            self.on_readable()
            return reached()

        return reached() or await waits.drive(self.fileno(), step, seconds)

    def _send(self) -> None:
        try:
            self._unsent = self._unsent[self._init.send(self._unsent) :]
        except BlockingIOError:
            return
        except OSError:  # it has exited; the sync socket says why
            self._unsent = memoryview(b"")

    def _on_init(self) -> None:
        """Receive messages one by one: those with descriptors are not merged (unix(7)).  At most two are expected."""
        for _ in range(MESSAGES):
            data, fds, sender = _receive(self._init, 256)
            if data is None:
                return
            if data and sender in self._makers and len(fds) == 1:
                self._on_announcement(decode_object(data), fds)
            for fd in fds:
                os.close(fd)
            if not data or self.pidfd >= 0:
                self._handlers.pop(self._init.fileno(), None)
                self._watch_init()  # there may be unsent messages
                return

    def _on_announcement(self, found: dict[str, object], fds: list[int]) -> None:
        """Record the newest process; removes its pidfd from `fds`."""
        stage1, stage2 = found.get("stage1_pid"), found.get("stage2_pid")
        if not isinstance(stage1, int) or not isinstance(stage2, int) or stage1 < 0 or stage2 < 0:
            return
        if stage2 > 0:
            self.pidfd = fds.pop()
        elif stage1 > 0 and self.stage1_pidfd < 0:
            self.stage1_pidfd = fds.pop()
            self._makers.add(stage1)
        else:
            return
        if self._killed:
            self.kill()
        self._announced(stage1, stage2)

    def _on_sync(self) -> None:
        for _ in range(MESSAGES):
            try:
                packet = self._sync.recv(PACKET_MAX)
            except BlockingIOError:
                return
            except OSError:
                packet = b""
            # Earlier messages may not have been read yet.
            if self.pidfd < 0 and self._init.fileno() in self._handlers:
                self._on_init()
            self._on_console()
            self._on_log()
            if not packet:
                self._forget(self._sync.fileno())
                self.ended = True
                return
            self._on_report(decode_object(packet))

    def _on_report(self, found: dict[str, object]) -> None:
        kind = found.get("type")
        if kind == "procReady":
            self.ready = True
        elif kind == "procHooks":
            self.at_hooks = True
        elif kind == "procSeccomp":
            number = found.get("fd")
            self.listener = number if isinstance(number, int) else -1
        elif kind == "procError" and self.error is None:
            self.error = report_error(found)

    def _on_console(self) -> None:
        if self._console is not None and self.console < 0:
            _, fds, _ = _receive(self._console, 16)
            self.console = fds.pop(0) if fds else -1
            for fd in fds:
                os.close(fd)

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
            found = decode_object(line)
            self._log(_text(found.get("level")) or "debug", _text(found.get("msg")) or repr(line[:200]))

    def _close_log(self) -> None:
        if self._log_fd >= 0:
            os.close(self._log_fd)
            self._log_fd = -1

    def _forget(self, fd: int) -> None:
        if self._handlers.pop(fd, None) is not None:
            self._watch(fd, None)

    def kill(self) -> None:
        """Kill stages 1 and 2, now or as soon as they are known."""
        self._killed = True
        if not self._events and not self.ended:  # wake the caller for their pids again
            self._events = select.EPOLLIN
            self._watch(self._sync.fileno(), self._events)
            self._watch_init()
        for pidfd in (self.stage1_pidfd, self.pidfd):
            if pidfd >= 0:
                kill(pidfd)

    def release_init(self) -> None:
        """Tell the init that the runtime's hooks have run."""
        try:
            self._sync.send(b"1")
        except OSError:  # it has exited; `ended` says so
            pass

    def take_console(self) -> int | None:
        """Give the terminal's master to the caller; None if there is none."""
        fd, self.console = self.console, -1
        return None if fd < 0 else fd

    def take_pidfd(self) -> int:
        """Give the process's pidfd to the caller."""
        fd, self.pidfd = self.pidfd, -1
        return fd

    def close(self) -> None:
        """Close everything.  Idempotent."""
        self.close_child_ends()
        self._on_log()
        self._close_log()
        self._handlers.clear()
        for end in (self._init, self._sync, self._console, self._epoll):
            if end is not None:
                end.close()
        for fd in (self.pidfd, self.stage1_pidfd, self.console):
            if fd >= 0:
                os.close(fd)
        self.pidfd = self.stage1_pidfd = self.console = -1


def kill(pidfd: int) -> None:
    """Send SIGKILL to a process that may have exited."""
    try:
        signal.pidfd_send_signal(pidfd, SIGKILL)
    except ProcessLookupError:
        pass


def report_error(found: dict[str, object]) -> LaunchError:
    """Build the error from a procError packet."""
    where, path, why = (_text(found.get(key)) for key in ("step", "path", "why"))
    errno = found.get("errno")
    return launch_error(where, path, errno if isinstance(errno, int) else 0, why)


def _receive(sock: socket.socket, size: int) -> tuple[bytes | None, list[int], int]:
    """Receive data, descriptors and the sender's pid if the socket passes it; None if nothing has arrived."""
    room = socket.CMSG_SPACE(4 * INT_SIZE) + socket.CMSG_SPACE(3 * INT_SIZE)
    try:
        data, ancillary, _, _ = sock.recvmsg(size, room, socket.MSG_CMSG_CLOEXEC)
    except BlockingIOError:
        return None, [], 0
    except OSError:
        return b"", [], 0
    fds: list[int] = []
    sender = 0
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            whole = len(payload) - len(payload) % INT_SIZE
            fds += [int.from_bytes(payload[at : at + INT_SIZE], sys.byteorder) for at in range(0, whole, INT_SIZE)]
        elif level == socket.SOL_SOCKET and kind == SCM_CREDENTIALS:
            sender = int.from_bytes(payload[:INT_SIZE], sys.byteorder)
    return data, fds, sender


def decode_object(data: bytes) -> dict[str, object]:
    """Decode a JSON object, empty if it is not one.  Bytes of file names that are not UTF-8 survive."""
    try:
        found = loads(data.decode("utf-8", "surrogateescape"))
    except JsonError:
        return {}
    return found if isinstance(found, dict) else {}


def _text(value: object) -> str:
    return value if isinstance(value, str) else ""
