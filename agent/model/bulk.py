"""What the streams of all processes share: how many of their pipes are large, and which process moves data now."""

from __future__ import annotations

import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.model.reaper import Child

#: Maximum large pipes at once: they can hold 32 MiB of the guest's memory.
MAX_LARGE_PIPES = 8

#: Seconds after which a process that moved no data is idle.
IDLE = 0.2


class Bulk:
    """Grants large pipes, and knows whether the streams of more than one process move data."""

    def __init__(self, large_pipes: int = MAX_LARGE_PIPES) -> None:
        self._left = large_pipes
        self._latest: Child | None = None
        self._used = self._other_used = float("-inf")

    def take_pipe(self) -> bool:
        """Count another large pipe, if there may be one."""
        if not self._left:
            return False
        self._left -= 1
        return True

    def give_pipe(self) -> None:
        """Count one large pipe less."""
        self._left += 1

    def note(self, child: Child) -> None:
        """Record that a process's stream has moved data."""
        if child is not self._latest:
            self._latest, self._other_used = child, self._used
        self._used = time.monotonic()

    def is_only(self, child: Child) -> bool:
        """Return whether all other processes are idle."""
        others = self._other_used if child is self._latest else self._used
        return time.monotonic() - others > IDLE
