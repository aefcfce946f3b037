"""The pipes of a process that is about to start without a terminal."""

from __future__ import annotations

import os

from caisson.agent.libcontainer.process.launch import Stdio
from caisson.agent.model.bulk import Bulk
from caisson.agent.model.stdio import Input, Output, Streams, resize_pipe

#: The least memory limit of a container whose processes get large pipes, which are charged to it when full.
LARGE_PIPE_MEMORY = 128 << 20


class Pipes:
    """The three pipes of a process about to start: ``child_ends`` for the child, the rest for Streams.

    ``size`` is that of the pipes of output, in bytes; 0 starts with the kernel's default, and bulk streams get more.
    ``memory`` is the container's limit, if it has one: large pipes would take too much of a small one.  ``bulk`` is
    shared with other streams.
    """

    def __init__(self, size: int = 0, memory: int | None = None, bulk: Bulk | None = None) -> None:
        pairs: list[tuple[int, int]] = []
        try:
            for _ in range(3):
                pairs.append(os.pipe2(os.O_CLOEXEC))
        except OSError:
            for pair in pairs:
                for fd in pair:
                    os.close(fd)
            raise
        (stdin, self._stdin), (self._stdout, stdout), (self._stderr, stderr) = pairs
        self.child_ends = Stdio(stdin, stdout, stderr)
        self._bulk = bulk or Bulk()
        self._grow = size == 0
        self._may_be_large = memory is None or memory <= 0 or memory >= LARGE_PIPE_MEMORY
        if size > 0:
            for fd in (stdout, stderr):
                resize_pipe(fd, size)

    def started(self) -> Streams:
        """Keep only our ends: the child has its own."""
        self._close_child_ends()
        bulk, large = self._bulk, self._may_be_large
        stdout, stderr = (Output(fd, bulk, grows=self._grow, may_be_large=large) for fd in (self._stdout, self._stderr))
        return Streams(Input(self._stdin, bulk, may_be_large=large), stdout, stderr, None)

    def failed(self) -> None:
        """Close everything: there is no child."""
        self._close_child_ends()
        for fd in (self._stdin, self._stdout, self._stderr):
            os.close(fd)

    def _close_child_ends(self) -> None:
        for fd in (self.child_ends.stdin, self.child_ends.stdout, self.child_ends.stderr):
            os.close(fd)
