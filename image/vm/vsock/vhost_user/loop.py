"""An epoll loop: descriptors, timers, and a promise that no single event can end it."""

from __future__ import annotations

import os
import select
import time
from collections import deque
from collections.abc import Callable
from functools import partial

from .log import Log

Action = Callable[[], None]
Ready = Callable[[int], None]
Broken = Callable[[Exception], None]


class Timer:
    """A pending action; ``cancel()`` may be called at any time, also after it ran."""

    __slots__ = ("action", "due")

    def __init__(self, due: float, action: Action) -> None:
        self.due = due
        self.action: Action | None = action

    def cancel(self) -> None:
        self.action = None


class Loop:
    """Waits for descriptors and timers.  An exception that leaves a handler goes to its ``broken``, and no further."""

    def __init__(self, log: Log) -> None:
        self._log = log
        self._epoll = select.epoll()
        self._handlers: dict[int, tuple[Ready, Broken]] = {}
        self._gone: set[int] = set()
        # One queue for each delay: the next to fall due is always at a head, cancelled ones are skipped there.
        self._timers: dict[float, deque[Timer]] = {}
        self._status: int | None = None

    def add(self, fd: int, mask: int, ready: Ready, broken: Broken) -> None:
        """Watch ``fd`` for ``mask`` (EPOLL*)."""
        self._epoll.register(fd, mask)
        self._handlers[fd] = (ready, broken)

    def change(self, fd: int, mask: int) -> None:
        """Set another mask; an edge-triggered descriptor that is ready now is reported again."""
        self._epoll.modify(fd, mask)

    def remove(self, fd: int) -> None:
        """Stop watching; to be called before the descriptor is closed.  Does nothing for one that is not watched."""
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

    def run(self, turn: Callable[[], bool]) -> int:
        """Loop until ``stop``.  ``turn`` follows each batch of events, and says whether it wants another at once."""
        poll = self._epoll.poll
        handlers = self._handlers
        gone = self._gone
        busy = False
        while self._status is None:
            events = poll(0 if busy else self._timeout(), 64)
            gone.clear()
            for fd, mask in events:
                handler = handlers.get(fd)
                # A number closed in this batch may already belong to another file: its event here is not the new one's.
                if handler is None or fd in gone:
                    continue
                try:
                    handler[0](mask)
                except Exception as error:
                    self._guard(partial(handler[1], error))
            if self._timers:
                self._expire()
            try:
                busy = turn()
            except Exception as error:
                busy = False
                self._log(f"internal error: {describe(error)}")
        return self._status

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

    def _expire(self) -> None:
        now = time.monotonic()
        for queue in list(self._timers.values()):
            while queue and (queue[0].action is None or queue[0].due <= now):
                action = queue.popleft().action
                if action is not None:
                    self._guard(action)


def describe(error: BaseException) -> str:
    """An exception in one line, with the place it came from."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    place = f" at {os.path.basename(trace.tb_frame.f_code.co_filename)}:{trace.tb_lineno}" if trace else ""  # noqa: PTH119
    return f"{type(error).__name__}: {error}{place}"
