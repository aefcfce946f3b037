"""Standard streams of a container's process, and how callers learn of it: terminal, pipes, pid file, sockets."""

from __future__ import annotations

import os

from caisson.agent.libcontainer.process.launch import Stdio
from caisson.agent.libcontainer.waits import complete
from caisson.agent.runtime.errors import CommandError

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from types import TracebackType

    from caisson.agent.libcontainer.config.process import Process
    from caisson.agent.libcontainer.process.launch import Launched
    from caisson.agent.runtime.main import Call
else:
    import _socket as socket

FIRST = 3  # descriptor that is neither of stdio
TIOCGPTN = 0x80045430


class ProcessIO:
    """The descriptors that a process gets from this program, for a `with` block around its start.

    `stdio` is None for a process with a terminal; it keeps `preserved` descriptors from 3 on.
    """

    def __init__(self, call: Call, process: Process | None, *, detach: bool) -> None:
        """Raises CommandError for contradictory options."""
        self._call = call
        self._detach = detach
        self._console_socket = call.options.text("console-socket")
        self._console = self._pidfd = -1
        self._own: list[int] = []  # our ends of its pipes
        self._child_ends: list[int] = []
        terminal = process is not None and process.terminal
        if terminal and detach and not self._console_socket:
            raise CommandError("cannot allocate tty if runc will detach without setting console socket")
        if self._console_socket and not (terminal and detach):
            raise CommandError("cannot use console socket if runc will not detach or allocate tty")
        self.preserved = max(0, call.options.number("preserve-fds")) + listen_fds()
        check_preserved(self.preserved)
        self.stdio = None if terminal else self._streams()

    def _streams(self) -> Stdio:
        if self._detach:
            return Stdio(0, 1, 2)
        pairs = [os.pipe2(os.O_CLOEXEC) for _ in range(3)]
        (stdin, own_in), (own_out, stdout), (own_err, stderr) = pairs
        self._own = [own_in, own_out, own_err]
        self._child_ends = [stdin, stdout, stderr]
        return Stdio(*self._child_ends)

    def __enter__(self) -> ProcessIO:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._close_child_ends()
        for fd in (*self._own, self._console, self._pidfd):
            if fd >= 0:
                os.close(fd)
        self._own = []
        self._console = self._pidfd = -1

    def _close_child_ends(self) -> None:
        for fd in self._child_ends:
            os.close(fd)
        self._child_ends = []

    def announced(self, pid: int) -> None:
        """Send a pidfd to the --pidfd-socket, before the program runs.  Raises CommandError."""
        path = self._call.options.text("pidfd-socket")
        if path:
            pidfd = os.pidfd_open(pid)
            try:
                send_fd(path, pidfd, b"pidfd")
            finally:
                os.close(pidfd)

    def launched(self, launched: Launched) -> None:
        """Take over the terminal and the pidfd of a started process.  Raises CommandError."""
        self._close_child_ends()
        self._pidfd = launched.pidfd
        for stage in launched.stages:  # as zombies they would count as processes of the container
            complete(stage.wait())
        if launched.console is not None:
            self._console = launched.console
            if self._console_socket:
                send_fd(self._console_socket, self._console, pty_name(self._console))
            else:
                from caisson.agent.runtime.foreground import keep_newlines

                keep_newlines(self._console)
        path = self._call.options.text("pid-file")
        if path:
            write_pid_file(path, launched.child.pid)

    def follow(self, pid: int) -> int:
        """Copy the streams and pass on signals until the process exits; return its status."""
        from caisson.agent.runtime.foreground import Foreground

        own, self._own = self._own, []
        console, self._console = self._console, -1
        return Foreground(pid, self._pidfd, own, console).run()


def pty_name(master: int) -> bytes:
    """Return the name of a terminal in its container, "/dev/pts/0"."""
    import fcntl
    from struct import unpack

    (number,) = unpack("I", fcntl.ioctl(master, TIOCGPTN, bytes(4)))
    return f"/dev/pts/{number}".encode()


def send_fd(path: str, fd: int, payload: bytes) -> None:
    """Send a descriptor to a Unix socket (SCM_RIGHTS).  Raises CommandError."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.connect(path)
        rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS, fd.to_bytes(4, "little"))
        connection.sendmsg([payload], [rights])
    except OSError as error:
        raise CommandError(f"dial unix {path}: connect: {(error.strerror or str(error)).lower()}") from None
    finally:
        connection.close()


def write_pid_file(path: str, pid: int) -> None:
    """Write a pid to a file atomically.  Raises CommandError or OSError."""
    path = os.path.abspath(path)  # noqa: PTH100 - no pathlib at start
    temporary = f"{os.path.dirname(path)}/.{os.path.basename(path)}"  # noqa: PTH119, PTH120
    try:
        fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_SYNC | os.O_CLOEXEC, 0o666)
    except OSError as error:
        raise CommandError(f"open {temporary}: {(error.strerror or '').lower()}") from None
    try:
        os.write(fd, str(pid).encode())
    finally:
        os.close(fd)
    os.replace(temporary, path)  # noqa: PTH105


def listen_fds() -> int:
    """Return how many sockets this program was given for the container (sd_listen_fds(3))."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()):
        return 0
    text = os.environ.get("LISTEN_FDS", "")
    return int(text) if text.isascii() and text.isdecimal() else 0


def listen_environment() -> list[str]:
    """Return the environment for a process that gets them."""
    count = listen_fds()
    return [f"LISTEN_FDS={count}", "LISTEN_PID=1"] if count else []


def check_preserved(count: int) -> None:
    """Check that all descriptors to pass on were given to this program.  Raises CommandError."""
    for fd in range(FIRST, FIRST + count):
        try:
            given = os.get_inheritable(fd)  # descriptors that this program opened do not count
        except OSError:
            given = False
        if not given:
            where = f"/proc/self/fd/{fd}: no such file or directory"
            raise CommandError(f"unable to stat preserved-fd {fd - FIRST} (of {count}): {where}")
