"""An epoll loop: descriptors, timers, busy polling, and a guarantee that no single event can stop it."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial

from .log import RateLimitedLog, describe

TYPE_CHECKING = False  # saves importing typing
if TYPE_CHECKING:
    from typing import Protocol
else:
    Protocol = object

Action = Callable[[], None]
Ready = Callable[[int], None]
Broken = Callable[[Exception], None]

#: Short sleeps before the next busy poll, after an unsuccessful one.
POLL_BACKOFF = 8


class Work(Protocol):
    """The work between waits, and how to learn of more."""

    def process(self) -> bool:
        """Do available work, after each batch of events; True to be called again immediately."""

    def worth_polling(self) -> bool:
        """Return whether a response is likely to come next, so that busy polling is worthwhile."""

    def has_available(self) -> bool:
        """Return whether there is work that no descriptor reports.  Called often, while polling."""

    def enable_notifications(self) -> bool:
        """Make a descriptor report new work from now on; True if there already is some."""


class Timer:
    """A pending action; ``cancel()`` may be called at any time, also after it ran."""

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Action) -> None:
        self.due = due
        self.action: Action | None = action

    def cancel(self) -> None:
        self.action = None


class Loop:
    """Wait for descriptors and timers.  A handler's exception goes to its ``broken``, and no further.

    ``busy_poll``: seconds to poll for an event before sleeping, while events arrive that fast.
    """

    def __init__(self, log: RateLimitedLog, busy_poll: float = 0.0) -> None:
        self._log = log
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[Ready, Broken]] = {}
        self._gone: set[int] = set()
        # One queue for each delay: the next due one is always at a head, where cancelled ones are skipped.
        self._timers: dict[float, deque[Timer]] = {}
        self._status: int | None = None
        self._busy_poll = busy_poll if len(os.sched_getaffinity(0)) > 1 else 0.0
        self._backoff = 1  # short sleeps before the next busy poll

    def add(self, fd: int, mask: int, ready: Ready, broken: Broken) -> None:
        """Watch ``fd`` for ``mask`` (EPOLL*)."""
        self._epoll.register(fd, mask)
        self._handlers[fd] = (ready, broken)

    def change(self, fd: int, mask: int) -> None:
        """Set another mask; an edge-triggered descriptor that is ready now is reported again."""
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Stop watching; call it before closing the descriptor.  Does nothing if it is not watched."""
        if self._handlers.pop(fd, None) is not None:
            self._gone.add(fd)
            self._epoll.unregister(fd)

    def after(self, delay: float, action: Action) -> Timer:
        """Run ``action`` in ``delay`` seconds.  Use few different delays."""
        timer = Timer(time.monotonic() + delay, action)
        self._timers.setdefault(delay, deque()).append(timer)
        return timer

    def stop(self, status: int) -> None:
        """Make ``run`` return ``status``."""
        if self._status is None:
            self._status = status

    def run(self, work: Work) -> int:
        """Loop until ``stop``; returns its status."""
        poll = self._epoll.poll
        handlers = self._handlers
        gone = self._gone
        busy = False
        while self._status is None:
            events = poll(0, 64) if busy else self._wait(work)
            gone.clear()
            for fd, mask in events:
                handler = handlers.get(fd)
                # A descriptor closed in this batch may already be reused: its event here is not the new one's.
                if handler is None or fd in gone:
                    continue
                try:
                    handler[0](mask)
                except Exception as error:
                    self._guard(partial(handler[1], error))
            try:
                busy = work.process()
            except Exception as error:
                busy = False
                self._log(f"internal error: {describe(error)}")
            if self._timers and self._expire():
                busy = True
        return self._status

    def _wait(self, work: Work) -> Sequence[tuple[int, int]]:
        """Return the next events; none when a timer is due, or when there is work without them.

        Sleeping and waking, with cold caches, takes about as long as the other side's response.  So after a short sleep
        the next wait starts with a busy poll; other processes get the CPU in between.  If nothing arrives in time, the
        machine is idle or crowded: then a few short sleeps must come first.
        """
        poll, clock = self._epoll.poll, time.perf_counter
        if self._backoff <= 0 and work.worth_polling():
            until = clock() + self._busy_poll
            while clock() < until:
                if work.has_available():
                    return ()
                events = poll(0, 64)
                if events:
                    return events
                os.sched_yield()
            self._backoff = POLL_BACKOFF
        if work.enable_notifications():
            return ()
        began = clock()
        events = poll(self._timeout(), 64)
        if clock() - began < self._busy_poll:
            self._backoff -= 1
        else:
            self._backoff = max(self._backoff, 1)
        return events

    def close(self) -> None:
        self._epoll.close()

    def _guard(self, action: Action) -> None:
        try:
            action()
        except Exception as error:
            self._log(f"internal error: {describe(error)}")

    def _timeout(self) -> float:
        due = None
        for queue in self._timers.values():
            while queue and queue[0].action is None:
                queue.popleft()
            if queue and (due is None or queue[0].due < due):
                due = queue[0].due
        return -1 if due is None else max(0.0, due - time.monotonic())

    def _expire(self) -> bool:
        """Run the timers that are due; True if there were any."""
        now = time.monotonic()
        some = False
        for queue in list(self._timers.values()):
            while queue and (queue[0].action is None or queue[0].due <= now):
                action = queue.popleft().action
                if action is not None:
                    self._guard(action)
                    some = True
        return some
