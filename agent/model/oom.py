"""Out-of-memory events of containers: watched, and queued in order for callers."""

from __future__ import annotations

import asyncio
from collections import deque

from caisson.agent.base.errors import NotFound

TYPE_CHECKING = False
if TYPE_CHECKING:
    from caisson.agent.libcontainer.cgroups.events import OomWatch

#: Maximum queued events; the oldest are dropped first.
MAX_EVENTS = 100


class OomEvents:
    """A queue of container ids.  A caller that stops waiting consumes no event."""

    def __init__(self) -> None:
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._waiters: set[asyncio.Future[None]] = set()

    def add(self, container_id: str) -> None:
        """Record an OOM kill in the container."""
        self._events.append(container_id)
        self._wake(None)

    async def next(self) -> str:
        """Wait for an event and take it.  Raises NotFound when the sandbox ends."""
        while not self._events:
            waiter: asyncio.Future[None] = asyncio.get_running_loop().create_future()
            self._waiters.add(waiter)
            try:
                await waiter
            finally:
                self._waiters.discard(waiter)
        return self._events.popleft()

    def end(self) -> None:
        """End all waits when the sandbox ends, and drop queued events."""
        self._events.clear()
        self._wake(NotFound("there are no more events: the sandbox has ended"))

    def _wake(self, error: NotFound | None) -> None:
        # Wake all of them: one may be cancelled before it runs.
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None) if error is None else waiter.set_exception(error)


class OomWatcher:
    """Drive a cgroup's watch (libcontainer/cgroups/events.py) by the event loop, until it is closed."""

    def __init__(self, watch: OomWatch) -> None:
        self._watch = watch
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._fd = watch.fileno()
        self._loop.add_reader(self._fd, self._ready)

    def _ready(self) -> None:
        self._watch.on_readable()
        if self._watch.fileno() < 0:  # its cgroup has been removed
            self.close()
        else:
            self._set_timer()

    def _set_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        delay = self._watch.delay
        self._timer = None if delay is None else self._loop.call_later(delay, self._on_timeout)

    def _on_timeout(self) -> None:
        self._timer = None
        self._watch.on_timeout()
        self._set_timer()

    def close(self) -> None:
        """Stop watching.  Idempotent."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            self._watch.close()
            self._fd = -1
