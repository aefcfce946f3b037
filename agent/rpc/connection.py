"""A server's end of a connection, for any protocol: fair input, calls in progress, output, memory limits."""

from __future__ import annotations

import asyncio
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine
    from typing import Any, ClassVar

    from caisson.agent.base.log import Log

    Buffer = bytes | bytearray | memoryview

#: Frames handled before other connections get a turn: a buffer can hold tens of thousands of small ones.
FRAMES_PER_TURN = 64

#: Maximum calls in progress on a connection.
MAX_CALLS = 4096

#: Bytes that a connection's requests and unsent responses may hold: 64 inputs of a MiB each.
MAX_HELD = 64 << 20


class Connection(asyncio.BufferedProtocol):
    """Base class of a protocol's connection, which defines ``feed``, ``handle_frame`` and ``drain``.

    ``buffer`` receives input: all connections of a thread can share one.  ``on_lost`` is called when it closes.
    """

    #: Whether a call starts in the loop iteration that received its request, if Python can do so (3.12): a method that
    #: does not wait then needs no iteration of its own.
    EAGER: ClassVar[bool] = False

    def __init__(self, buffer: memoryview, log: Log, on_lost: Callable[[Any], None]) -> None:
        self.log = log
        self.held = 0  # bytes of requests and unsent responses
        self._buffer = buffer
        self._on_lost = on_lost
        self._transport: asyncio.Transport | None = None
        self._output: list[Buffer] = []
        self._calls: dict[int, asyncio.Task[None]] = {}
        self._backlog = False  # there may be unhandled frames
        self._blocked = False  # the peer does not read
        self._turn: asyncio.Handle | None = None
        self._in_turn = False

    # Defined by a protocol

    def feed(self, data: memoryview) -> None:
        """Take input; the memory is reused afterwards."""
        raise NotImplementedError

    def handle_frame(self) -> bool:
        """Handle the next frame of the input; False if there is no complete one."""
        raise NotImplementedError

    def drain(self) -> None:
        """Accept no more requests, and tell the peer if the protocol can."""
        raise NotImplementedError

    # Calls and output

    @property
    def calls(self) -> list[asyncio.Task[None]]:
        """The calls in progress."""
        return list(self._calls.values())

    def start_call(self, stream_id: int, work: Coroutine[Any, Any, None]) -> None:
        """Run a call's coroutine, which calls ``end_call`` as it ends; it is cancelled with the connection."""
        loop = asyncio.get_running_loop()
        if sys.version_info >= (3, 12) and self.EAGER:
            task: asyncio.Task[None] = asyncio.Task(work, loop=loop, eager_start=True)
        else:
            task = loop.create_task(work)
        if not task.done():
            self._calls[stream_id] = task

    def end_call(self, stream_id: int) -> None:
        """Forget a call.  Not a callback of its task: that would take another loop iteration per call."""
        self._calls.pop(stream_id, None)

    def cancel_call(self, stream_id: int) -> None:
        """Cancel a call if it is in progress; it counts until it has ended."""
        if (task := self._calls.get(stream_id)) is not None:
            task.add_done_callback(lambda _: self.end_call(stream_id))  # if it is cancelled before it has started
            task.cancel()

    def write(self, *data: Buffer) -> None:
        """Queue output; ``flush`` sends it."""
        self._output += data

    def flush(self) -> None:
        """Send queued output; done after each turn, not within one."""
        if self._in_turn or not self._output:
            return
        output, self._output = self._output, []
        if self._transport is None or self._transport.is_closing():
            return
        if len(output) == 1:
            self._transport.write(output[0])
        else:
            self._transport.writelines(output)

    def close(self) -> None:
        """Send queued output, close the connection, and cancel its calls."""
        self._in_turn = False
        self.flush()
        if self._transport is not None:
            self._transport.close()
        self._cancel_calls()

    def _cancel_calls(self) -> None:
        for stream_id in list(self._calls):
            self.cancel_call(stream_id)

    # asyncio's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self.feed(self._buffer[:count])
        self._take_turn()

    def pause_writing(self) -> None:
        # Do not read from a peer that does not read: responses, including those to pings and errors, must not pile up.
        self._blocked = True
        self._schedule()

    def resume_writing(self) -> None:
        self._blocked = False
        self._schedule()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        if self._turn is not None:
            self._turn.cancel()
        self._cancel_calls()
        self._on_lost(self)

    def _take_turn(self) -> None:
        """Handle a bounded number of frames, and leave the rest for the next turn."""
        self._turn = None
        self._in_turn = True
        try:
            for _ in range(FRAMES_PER_TURN):
                if self._transport is None or self._transport.is_closing():
                    return
                self._backlog = self.handle_frame()
                if not self._backlog:
                    break
        finally:
            self._in_turn = False
        self.flush()
        self._schedule()

    def _schedule(self) -> None:
        if self._transport is None or self._transport.is_closing():
            return
        if self._backlog or self._blocked:
            self._transport.pause_reading()
        else:
            self._transport.resume_reading()
        if self._backlog and not self._blocked and self._turn is None:
            self._turn = asyncio.get_running_loop().call_soon(self._take_turn)
