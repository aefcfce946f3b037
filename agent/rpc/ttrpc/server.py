"""A ttrpc server's connection, on asyncio.  Source: containerd/ttrpc, PROTOCOL.md.

Requests of a connection are handled concurrently and answered in any order.  The protocol has no flow control, so a
request beyond a limit gets an error response, and a peer that does not read its responses is not read from.
"""

from __future__ import annotations

import asyncio
import os
import socket
from contextlib import suppress

from google.protobuf.message import DecodeError

from caisson.agent.rpc import wire
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.connection import MAX_CALLS, MAX_HELD, Connection
from caisson.agent.rpc.ttrpc import frames
from caisson.proto.ttrpc import ttrpc_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from caisson.agent.base.log import Log
    from caisson.agent.rpc.connection import Buffer
    from caisson.agent.rpc.dispatch import Dispatch

#: Seconds to let more of a long frame arrive before it is received: vsock delivers data by the page, and a turn of the
#: event loop for each takes more CPU time than all the rest.  Where the kernel can wait for a number of bytes it does.
GATHER = 0.001

#: Bytes to wait for: three quarters of a vsock socket's buffer, so that the peer can send while the agent wakes up.
LOW_WATER = 3 << 16

#: The first kernel in which a reader that waits for bytes grants the peer all credit (before, both could wait for
#: ever): "virtio/vsock: send credit update during setting SO_RCVLOWAT".
LOW_WATER_KERNEL = (6, 8)

#: Seconds after which the agent takes what has arrived: a device might send nothing when little credit is left.
MAX_WAIT = 0.1


class TtrpcConnection(Connection):
    """Serve one peer from a dispatch."""

    EAGER = True

    def __init__(self, dispatch: Dispatch, buffer: memoryview, log: Log, on_lost: Callable[[Any], None]) -> None:
        super().__init__(buffer, log, on_lost)
        self._dispatch = dispatch
        self._reader = frames.FrameReader()
        self._room: memoryview | None = None  # of a long frame, where input is put now
        self._low_water: LowWater | None = None
        self._leaving = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        self._low_water = low_water(transport.get_extra_info("socket"))

    def connection_lost(self, error: Exception | None) -> None:
        if self._low_water is not None:
            self._low_water.close()
        super().connection_lost(error)

    def get_buffer(self, sizehint: int) -> memoryview:
        self._room = self._reader.room()
        return self._room or super().get_buffer(sizehint)

    def buffer_updated(self, count: int) -> None:
        if not self._room:
            super().buffer_updated(count)
            return
        self._room = None
        self._reader.received(count)
        if self._reader.room() is None:
            self._take_turn()
        elif self._low_water is not None and self._low_water.usable:
            self._schedule()
        elif self._transport is not None:
            self._transport.pause_reading()
            asyncio.get_running_loop().call_later(GATHER, self._schedule)

    def _schedule(self) -> None:
        if self._low_water is not None:
            self._low_water.set(len(self._reader.room() or b"\0"))
        super()._schedule()

    def feed(self, data: memoryview) -> None:
        self._reader.feed(data)

    def handle_frame(self) -> bool:
        frame = self._reader.next()
        if frame is None:
            return False
        try:
            self._handle(frame)
        except _Refused as refused:
            self.write(frames.failure(frame.stream_id, *refused.status))
        return True

    def drain(self) -> None:
        self._leaving = True  # there is no frame to announce it

    def _handle(self, frame: frames.Frame) -> None:
        if frame.kind not in (frames.REQUEST, frames.DATA):
            return  # a response, or a type of a later version: ignored, as other servers do
        if not frame.stream_id & 1:
            raise _Refused(StatusCode.INVALID_ARGUMENT, "stream id must be odd")
        if frame.data is None:
            raise _Refused(StatusCode.INVALID_ARGUMENT, frames.too_long(frame.length))
        if frame.kind == frames.DATA:
            raise _Refused(StatusCode.INVALID_ARGUMENT, "stream is no longer active")
        if frame.flags & (frames.REMOTE_OPEN | frames.REMOTE_CLOSED):
            raise _Refused(StatusCode.UNIMPLEMENTED, "streams are not supported, only unary calls")
        if frame.stream_id in self._calls:
            raise _Refused(StatusCode.INVALID_ARGUMENT, "stream id is in use")
        if self._leaving:
            raise _Refused(StatusCode.UNAVAILABLE, "the server is stopping")
        if len(self._calls) >= MAX_CALLS:
            raise _Refused(StatusCode.RESOURCE_EXHAUSTED, f"more than {MAX_CALLS} calls at once")
        if self.held + len(frame.data) > MAX_HELD:
            raise _Refused(StatusCode.RESOURCE_EXHAUSTED, f"requests of more than {MAX_HELD} bytes at once")
        self._start(frame.stream_id, frame.data)

    def _start(self, stream_id: int, data: bytes | bytearray) -> None:
        try:
            path, payload, timeout = _request(data)
        except DecodeError:
            raise _Refused(StatusCode.INVALID_ARGUMENT, "the frame's data is not a valid ttrpc.Request") from None
        self.held += len(data)
        self.start_call(stream_id, self._serve(stream_id, path, [payload], timeout, len(data)))

    async def _serve(self, stream_id: int, path: str, payload: list[Buffer], timeout: float | None, size: int) -> None:
        try:
            code, result = await self._dispatch.call(path, payload.pop(), timeout)  # free it during the call
        finally:
            self.held -= size
            self.end_call(stream_id)
        if isinstance(result, list):
            self.write(*frames.response(stream_id, result))
        else:
            self.write(frames.failure(stream_id, code, result.text, result.detail))
        self.flush()


class LowWater:
    """A socket that becomes readable only when enough bytes of a long frame have arrived (SO_RCVLOWAT).

    It never waits for more than the rest of the frame: the peer might be waiting for the agent then.
    """

    def __init__(self, connected: socket.socket) -> None:
        self.usable = True
        self._socket = connected
        self._bytes = 1
        self._timer: asyncio.TimerHandle | None = None

    def set(self, rest: int) -> None:
        """Wait for the ``rest`` of a frame or, if that is long, for a large part of it."""
        wanted = min(rest, LOW_WATER)
        if wanted == self._bytes or not self.usable:
            return
        try:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, wanted)
        except OSError:
            self.usable = False  # another transport than virtio's; 1 byte is what all begin with
            return
        self._bytes = wanted
        if wanted > 1 and self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(MAX_WAIT, self._take_what_came)

    def close(self) -> None:
        """Stop the timer."""
        if self._timer is not None:
            self._timer.cancel()

    def _take_what_came(self) -> None:
        self._timer = None
        self.set(1)


def low_water(connected: socket.socket) -> LowWater | None:
    """Return the low water mark of a socket; None where it does nothing, or not what it should."""
    works = connected.family == socket.AF_VSOCK and kernel_version(os.uname().release) >= LOW_WATER_KERNEL
    return LowWater(connected) if works else None


def kernel_version(release: str) -> tuple[int, ...]:
    """Return the first two numbers of a kernel's release, (0, 0) if there are none."""
    numbers = release.partition("-")[0].split(".")[:2]
    return tuple(map(int, numbers)) if all(number.isdecimal() for number in numbers) else (0, 0)


class _Refused(Exception):
    """A request that is rejected immediately."""

    def __init__(self, code: StatusCode, text: str) -> None:
        super().__init__(code, text)
        self.status = code, text


def _request(data: bytes | bytearray) -> tuple[str, Buffer, float | None]:
    """Return the path, the payload and the timeout in seconds of a ttrpc.Request.  Raises DecodeError.

    A long payload stays in its receive buffer: protobuf would copy it twice.
    """
    if isinstance(data, bytearray) and (fields := wire.views(memoryview(data), 3)):
        service, method, payload = fields
        with suppress(UnicodeDecodeError):
            return f"/{str(service, 'utf-8')}/{str(method, 'utf-8')}", payload, None
    request = ttrpc_pb2.Request.FromString(bytes(data))
    timeout = request.timeout_nano / 1e9 if request.timeout_nano > 0 else None
    return f"/{request.service}/{request.method}", request.payload, timeout
