"""A process in a container, from its start until its status is no longer needed."""

from __future__ import annotations

import os
import signal

from caisson.agent.base.errors import NoTerminal
from caisson.agent.base.syscalls import RT_SIGTIMEDWAIT
from caisson.agent.model.pipes import Pipes
from caisson.agent.model.reaper import Child
from caisson.agent.model.stdio import Streams

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from caisson.agent.libcontainer.cgroups.base import JoinFds
    from caisson.agent.libcontainer.process.launch import Launched, Stdio
    from caisson.agent.model.bulk import Bulk

#: Maximum bytes of a status file to read.
MAX_STATUS = 1 << 20


class Process:
    """A started process: its streams, signals and exit."""

    def __init__(self, exec_id: str, child: Child, streams: Streams) -> None:
        self.exec_id = exec_id
        self.child = child
        self._streams = streams

    @property
    def has_terminal(self) -> bool:
        """Whether it has a terminal, and so a single output stream."""
        return self._streams.is_terminal

    async def wait(self) -> int:
        """Wait for its exit status; any number of waiters, any number of times."""
        return await self.child.wait()

    async def read_stdout(self, size: int) -> bytes:
        """Read output, or EndOfStream."""
        return await self._streams.stdout.read(size, self.child)

    async def read_stderr(self, size: int) -> bytes:
        """Read error output, or EndOfStream.  A terminal has only one output, which is read here, too."""
        return await self._streams.stderr.read(size, self.child)

    async def write(self, data: bytes | memoryview) -> int:
        """Write input to it; returns how many bytes were accepted.  Raises BrokenStream.

        ^C on a terminal also ends an init process that the kernel would not interrupt, as it would end the program
        elsewhere.
        """
        taken = await self._streams.stdin.write(data, self.child)
        if self._streams.interrupts(data, self.child.pid) and kernel_drops(self.child.pid, signal.SIGINT):
            self.child.signal(signal.SIGKILL)
        return taken

    async def close_stdin(self) -> None:
        """End its input; a terminal's is ended by typing ^D."""
        if not self._streams.is_terminal:
            await self._streams.stdin.close()

    def resize(self, rows: int, columns: int) -> None:
        """Set its terminal's size.  Raises NoTerminal."""
        if not self._streams.is_terminal:
            raise NoTerminal(exec_id=self.exec_id)
        self._streams.resize(rows, columns)

    def exited(self) -> None:
        """Release what an exited process does not need."""
        self._streams.exited()

    def release(self) -> None:
        """Release everything; unread output is lost."""
        self._streams.close()


def kernel_drops(pid: int, number: int) -> bool:
    """Return whether the kernel drops a signal: for PID 1 of a namespace that neither catches nor blocks it.

    Ignored signals do not count.  Source: pid_namespaces(7); SigCgt, SigIgn and SigBlk in proc(5).
    """
    status = _status(pid)
    first = status.get(b"NSpid", [])[-1:] == [b"1"]
    heard = any(_has(number, status.get(field, [])) for field in (b"SigCgt", b"SigIgn", b"SigBlk"))
    return first and not heard and not _awaits_signals(pid)


def _awaits_signals(pid: int) -> bool:
    """Return whether it is in sigwait(3): SigBlk does not show the signals that it is waiting for."""
    try:
        with open(f"/proc/{pid}/syscall", "rb") as file:  # noqa: PTH123 - a procfs file
            return file.read(MAX_STATUS).split()[:1] == [b"%d" % RT_SIGTIMEDWAIT]
    except OSError:
        return False


def _has(number: int, words: list[bytes]) -> bool:
    return bool(words) and bool(int(words[0], 16) >> (number - 1) & 1)


def _status(pid: int) -> dict[bytes, list[bytes]]:
    """Read the fields of /proc/<pid>/status (proc(5)); none of a process that has ended.

    A process in 65,536 groups has a status of 700 KB.
    """
    try:
        with open(f"/proc/{pid}/status", "rb") as file:  # noqa: PTH123 - a procfs file
            lines = file.read(MAX_STATUS).splitlines()
    except OSError:
        return {}
    return {name: value.split() for name, _, value in (line.partition(b":") for line in lines)}


async def start_process(
    launch: Callable[[Stdio | None, dict[str, int]], Awaitable[Launched]],
    exec_id: str,
    make_pipes: Callable[[], Pipes] | None,
    bulk: Bulk,
    join: JoinFds | None,
) -> tuple[Process, int]:
    """Start a process in a cgroup, with pipes or a terminal; returns it and its pidfd.  Nothing is left on failure."""
    pipes = None if make_pipes is None else make_pipes()
    stdio = None if pipes is None else pipes.child_ends
    try:
        if join is None:
            launched = await launch(stdio, {})
        else:
            with join as cgroup_fds:
                launched = await launch(stdio, cgroup_fds)
    except BaseException:
        if pipes is not None:
            pipes.failed()
        raise
    assert isinstance(launched.child, Child)  # the launcher's children are the reaper's
    try:
        if pipes is not None:
            streams = pipes.started()
        else:
            assert launched.console is not None
            streams = Streams.of_terminal(launched.console, bulk)
    except OSError:  # no descriptors are left
        launched.child.signal(signal.SIGKILL)
        os.close(launched.pidfd)
        raise
    return Process(exec_id, launched.child, streams), launched.pidfd
