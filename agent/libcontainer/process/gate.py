"""The start gate: the file at which a created init waits until some process starts it.

A fifo: the init opens it for writing, which blocks until a starter opens it for reading; then it writes "0" and, if it
fails before executing its program, an error report (a procError packet).  End of file means that it called execve, or
exited.

In a shared pid namespace an init must hold nothing that leads to the file: there the gate is a listening socket, of
which init has only the descriptor, and the connection carries the same data.  Sources: fifo(7), unix(7).
"""

from __future__ import annotations

import errno
import os
import select
import stat

from caisson.agent.libcontainer import faults
from caisson.agent.libcontainer.errors import LaunchError, reason
from caisson.agent.libcontainer.process.channel import decode_object, report_error
from caisson.agent.libcontainer.state import ProcessStat

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket

    from caisson.agent.libcontainer.waits import Waits
else:
    import _socket as socket

FIFO_MODE = 0o622  # an init that has become another user must be able to open it for writing
REPORT_MAX = 16384
GONE = "the container's init died before it was started"
STARTED = "the container was started before"
NOT_EXECUTED = "the container's init died before its program was executed"


def make(path: str, *, in_company: bool) -> tuple[str, int]:
    """Create the gate; return the name and the descriptor by which nsexec gets it.  Raises LaunchError."""
    try:
        return ("_CAISSON_START_SOCKET", _listen(path)) if in_company else ("_LIBCONTAINER_FIFOFD", _make_fifo(path))
    except OSError as error:
        raise LaunchError(
            f"exec fifo {path}: {reason(error.errno or 0)}", step="exec fifo", path=path, errno=error.errno or 0
        ) from error


def _make_fifo(path: str) -> int:
    os.mkfifo(path, FIFO_MODE)
    try:
        os.chmod(path, FIFO_MODE)  # noqa: PTH101 - whatever the umask is
        return os.open(path, os.O_PATH | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        os.unlink(path)  # noqa: PTH108 - no pathlib at start
        raise


def _listen(path: str) -> int:
    server = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: PTH120
    try:  # sun_path holds 107 bytes; the path of a state directory may be longer
        server.bind(f"/proc/self/fd/{directory}/{os.path.basename(path)}")  # noqa: PTH119
        server.listen(1)
        return server.detach()
    finally:
        os.close(directory)
        server.close()


def remove(path: str) -> None:
    """Remove the gate, if it exists."""
    try:
        os.unlink(path)  # noqa: PTH108 - no pathlib at start
    except FileNotFoundError:
        pass


async def open_and_follow(path: str, pid: int, pidfd: int, waits: Waits, timeout: float | None) -> None:
    """Open the gate for the init `pid` (and `pidfd`), remove it, and return once the program has been executed.

    Raises LaunchError, or TimeoutError if that takes longer than `timeout` seconds.
    """
    try:
        is_socket = stat.S_ISSOCK(os.stat(path).st_mode)  # noqa: PTH116 - no pathlib at start
        fd = _connect(path) if is_socket else os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        known = {errno.ENOENT: STARTED, errno.ECONNREFUSED: GONE}
        message = known.get(error.errno or 0) or f"exec fifo {path}: {reason(error.errno or 0)}"
        raise LaunchError(message, step="start", path=path, errno=error.errno or 0) from error
    faults.reach("start_opened")
    try:
        if is_socket:
            _ask(fd)
        await _until_end(fd, pidfd, waits, timeout)
        heard = _read(fd)
    finally:
        os.close(fd)
    if not heard:  # its exit, another starter's
        raise LaunchError(GONE, step="start", path=path)
    faults.reach("start_read")
    remove(path)
    faults.reach("start_removed")
    if len(heard) > 1:
        raise report_error(decode_object(heard[1:]))
    now = ProcessStat.read(pid)
    if now is not None and not now.executed:
        raise LaunchError(NOT_EXECUTED, step="start", path=path)


def failure_of(heard: str) -> LaunchError:
    """Build the error of a start by another program: `heard` is all that came through the gate (front/start.c)."""
    if len(heard) > 1:
        return report_error(decode_object(heard[1:].encode("utf-8", "surrogateescape")))
    return LaunchError(NOT_EXECUTED if heard else GONE, step="start")


def _ask(connection: int) -> None:
    """Ask an init to start, if it has not died meanwhile: then the connection is at its end."""
    try:
        os.write(connection, b"1")
    except (BrokenPipeError, ConnectionResetError):
        pass


def _connect(path: str) -> int:
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    directory = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)  # noqa: PTH120
    try:
        connection.connect(f"/proc/self/fd/{directory}/{os.path.basename(path)}")  # noqa: PTH119
        connection.setblocking(False)
        return connection.detach()
    finally:
        os.close(directory)
        connection.close()


async def _until_end(fd: int, pidfd: int, waits: Waits, timeout: float | None) -> None:
    """Wait until init has executed its program, or has exited.  Raises TimeoutError."""
    with select.epoll() as ends:
        ends.register(fd, 0)  # EPOLLHUP is reported all the same (epoll_ctl(2)); a pipe holds what precedes it
        ends.register(pidfd, select.EPOLLIN)
        if not await waits.readable(ends.fileno(), seconds=timeout):
            raise TimeoutError


def _read(fd: int) -> bytes:
    """Read all that has arrived, up to a limit."""
    found = b""
    try:
        while len(found) < REPORT_MAX and (data := os.read(fd, REPORT_MAX)):
            found += data
    except (BlockingIOError, ConnectionResetError):
        pass
    return found
