"""Deliver signals to an event loop in one iteration.

loop.add_signal_handler needs a second iteration for each signal, and imports ``inspect`` to check the handler.
"""

from __future__ import annotations

import os
import signal

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable
    from types import FrameType, TracebackType

READ_SIZE = 4096  # pending signals; whatever exceeds it is read in the next iteration


class Signals:
    """Call back on signals until `close`.  Only one at a time, in the main thread (signal.set_wakeup_fd)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._callbacks: dict[int, Callable[[], object]] = {}
        self._before: dict[int, object] = {}
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._outer = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
        loop.add_reader(self._reader, self._call)

    def handle(self, number: int, callback: Callable[[], object]) -> None:
        """Call back in the loop after a signal, once for several that are pending together."""
        self._callbacks[number] = callback
        before = signal.signal(number, _ignore)  # not SIG_IGN: the kernel would discard the signal
        self._before.setdefault(number, before)
        signal.siginterrupt(number, False)

    def close(self) -> None:
        """Restore the previous handlers.  Not idempotent."""
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
        for number in set(os.read(self._reader, READ_SIZE)):
            callback = self._callbacks.get(number)
            if callback is not None:
                callback()


def _ignore(number: int, frame: FrameType | None) -> None:
    """Do nothing: the interpreter has already written the number to the wakeup descriptor."""
