"""Containers that ran out of memory, in the order in which it happened, for whoever asks."""

from __future__ import annotations

import asyncio
from collections import deque

from caisson.agent.base.errors import NotFound

#: Events kept while nobody asks; the oldest go first.
MAX_EVENTS = 100


class OomEvents:
    """A queue of container ids.  Who stops waiting takes no event along."""

    def __init__(self) -> None:
        self._events: deque[str] = deque(maxlen=MAX_EVENTS)
        self._waiters: set[asyncio.Future[None]] = set()

    def add(self, container_id: str) -> None:
        """A process of the container was ended."""
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
        """The sandbox has ended: nobody waits any more, and what was not asked for is forgotten."""
        self._events.clear()
        self._wake(NotFound("there are no more events: the sandbox has ended"))

    def _wake(self, error: NotFound | None) -> None:
        # All of them: one who is woken may be cancelled before it comes to look.
        for waiter in self._waiters:
            if not waiter.done():
                waiter.set_result(None) if error is None else waiter.set_exception(error)
