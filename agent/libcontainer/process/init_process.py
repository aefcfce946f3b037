"""One nsexec with its stages, from the spawn to the process that it becomes."""

from __future__ import annotations

import os

from caisson.agent.libcontainer.process.channel import SetupChannel, kill
from caisson.agent.libcontainer.waits import Deadline

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from caisson.agent.libcontainer.process.children import Child, Children
    from caisson.agent.libcontainer.process.fork_server import ForkServer
    from caisson.agent.libcontainer.waits import Waits

CLEANUP_TIMEOUT = 5.0  # seconds for killed stages to exit


class InitProcess:
    """A process being set up: its channel and the stages known so far.

    `announced` is called with the process's pid as soon as it is known, while nsexec continues.
    """

    def __init__(
        self,
        children: Children,
        waits: Waits,
        log: Callable[[str, str], None],
        *,
        terminal: bool,
        announced: Callable[[int], object] | None = None,
    ) -> None:
        self._children = children
        self._waits = waits
        self._on_pid = announced
        self._pidfd0 = self._maker = -1
        self._server: ForkServer | None = None
        self.stages: list[Child] = []
        self.child: Child | None = None
        self.channel = SetupChannel(terminal=terminal, announced=self._announced, log=log)

    def spawned(self, pid: int) -> None:
        """Record stage 0.  Nothing was awaited since the spawn: the pid is still its own, even if it is dead."""
        self._pidfd0 = os.pidfd_open(pid)
        self.stages.append(self._children.claim(pid))
        self._maker = pid

    def requested(self, server: ForkServer) -> None:
        """Record that the process was requested from the fork server, which clones its first stage."""
        self._server = server
        self._maker = server.pid

    def send(self, messages: Callable[[], bytes], *, until_end: bool) -> None:
        """Encode and send messages, now that their receiver is being created; follow it also if that fails.

        ``until_end``: see SetupChannel.spawned.
        """
        try:
            self.channel.send(messages())
        finally:
            self.channel.spawned(self._maker, until_end=until_end)

    def _announced(self, stage1: int, stage2: int) -> None:
        if stage2 == 0:
            self.stages.append(self._children.claim(stage1))
        elif self.child is None:
            self.child = self._children.claim(stage2)
            if self._on_pid is not None:
                self._on_pid(stage2)

    async def destroy(self) -> None:
        """Kill all its stages, wait for them, close everything."""
        if self._pidfd0 >= 0:
            kill(self._pidfd0)
        self.channel.kill()
        # A stage whose pid is not known yet exits when it sees its parent die; the sync socket closes with the last
        # one.
        if self.stages or self._server is not None:
            ended = await self.channel.follow(self._waits, lambda: self.channel.ended, CLEANUP_TIMEOUT)
            if not ended and not self.pidfds() and self._server is not None:
                self._server.kill()  # it hangs
        deadline = Deadline(CLEANUP_TIMEOUT)
        children = [*self.stages, *([self.child] if self.child is not None else [])]
        for child, pidfd in zip(children, self.pidfds(), strict=False):
            if await self._waits.readable(pidfd, seconds=deadline.left):
                await child.wait()
        self.close()

    def pidfds(self) -> list[int]:
        """Return the stages' pidfds, in order of creation."""
        fds = (self._pidfd0, self.channel.stage1_pidfd, self.channel.pidfd)
        return [fd for fd in fds if fd >= 0]

    def close(self) -> None:
        """Close everything.  Idempotent."""
        self.channel.close()
        if self._pidfd0 >= 0:
            os.close(self._pidfd0)
            self._pidfd0 = -1
