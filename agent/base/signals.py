"""Signals in an event loop's own turn.

loop.add_signal_handler takes a second turn for each signal, and imports ``inspect`` to look at the handler.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from types import FrameType, TracebackType

MOST = 4096  # signals at once; more of them are the same ones again


class Signals:
    """Callbacks for signals, until `close`; one object at a time, in the main thread."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._before: dict[int, object] = {}
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._outer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        loop.add_reader(self._reader, self._call)

    def handle(self, number: int, callback: Callable[[], object]) -> None:
        """Call back in the loop after a signal, once for several that came together."""
        self._callbacks[number] = callback
        before = signal.signal(number, _ignore)  # SIG_IGN would be the kernel's to ignore
        self._before.setdefault(number, before)
        signal.siginterrupt(number, False)

    def close(self) -> None:
        """Put back the handlers that there were before."""
        for number, before in self._before.items():
            signal.signal(number, before)  # type: ignore[arg-type]
        signal.set_wakeup_fd(self._outer)
        self._loop.remove_reader(self._reader)
        os.close(self._reader)
        os.close(self._writer)

    def __enter__(self) -> Signals:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _call(self) -> None:
        for number in set(os.read(self._reader, MOST)):
            callback = self._callbacks.get(number)
            if callback is not None:
                callback()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the interpreter has written the number already."""
