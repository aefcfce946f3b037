"""One HTTP/2 connection, at the server: frames, streams, flow control.  Source: RFC 9113.

A request is handed over when all of it is there, and answered with all of the answer: that is all that unary calls of
gRPC need.  What comes in is not trusted: every length, window and order is checked, and what a peer can make this side
keep is bounded.
"""

from __future__ import annotations

import asyncio
from collections import deque

from caisson.agent.rpc.http2 import frames
from caisson.agent.rpc.http2.frames import Code, StreamError, Violation, unpadded
from caisson.agent.rpc.http2.hpack import Decoder, HpackError
from caisson.agent.rpc.http2.messages import Request, Response, checked

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from caisson.agent.base.log import Log
    from caisson.agent.rpc.http2.messages import Buffer

#: Requests that may be under way.
STREAMS = 4096

#: Bytes that may be on their way to us: of one request, and of all that are not yet here.
WINDOW = 1 << 24

#: The largest frame that is taken: for a request with a MiB of somebody's input two.
FRAME = 1 << 20

#: Bytes of header fields, as they are sent and as they count (section 6.5.2).
HEADERS = 1 << 16


class _Stream:
    """A request, and what of its answer has to wait for room."""

    def __init__(self, number: int, request: Request, window: int) -> None:
        self.number = number
        self.request = request
        self.window = window  # bytes that we may send
        self.ended = False  # the peer has sent all
        self.answering: asyncio.Task[None] | None = None
        self.pieces: deque[memoryview] = deque()
        self.trailers = b""


class Connection(asyncio.BufferedProtocol):
    """Speaks with one peer.

    ``serve`` answers a request; it is cancelled when the peer has lost interest.  ``largest``: bytes of a request's
    body beyond which no more are taken.  ``buffer`` is where what comes in is first put: all connections can share
    one.  ``lost`` is called at the end.
    """

    def __init__(
        self,
        serve: Callable[[Request], Awaitable[Response]],
        largest: int,
        buffer: memoryview,
        log: Log,
        lost: Callable[[Connection], None],
    ) -> None:
        self._serve = serve
        self._largest = largest
        self._buffer = buffer
        self._log = log
        self._on_lost = lost
        self._transport: asyncio.Transport | None = None
        self._input = bytearray()
        self._output: list[Buffer] = []
        self._started = False  # its preface has come
        self._settled = False  # and its settings
        self._leaving = False
        self._decoder = Decoder(HEADERS)
        self._block: tuple[int, int, bytearray] | None = None  # of headers that go on: stream, flags
        self._streams: dict[int, _Stream] = {}
        self._waiting: dict[int, _Stream] = {}  # of these the ones whose answers wait for room
        self._last = 0
        self._incoming = WINDOW
        self._window = frames.WINDOW  # bytes that we may send, on all streams together
        self._stream_window = frames.WINDOW  # the same, on each new one
        self._frame = frames.FRAME_SIZE

    # The transport's side

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._output.append(
            frames.settings(
                {
                    frames.MAX_CONCURRENT_STREAMS: STREAMS,
                    frames.INITIAL_WINDOW_SIZE: WINDOW,
                    frames.MAX_FRAME_SIZE: FRAME,
                    frames.MAX_HEADER_LIST_SIZE: HEADERS,
                }
            )
        )
        self._output.append(frames.number(frames.WINDOW_UPDATE, 0, WINDOW - frames.WINDOW))
        # Said with the first answer: a peer of another protocol must not get it.

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._buffer

    def buffer_updated(self, count: int) -> None:
        self._input += self._buffer[:count]
        try:
            self._take()
        except Violation as violation:
            self._log("warning", "closed a connection that breaks HTTP/2", error=str(violation))
            self._output.append(frames.goaway(self._last, violation.code, str(violation)))
            self._flush()
            self.close()
        else:
            if self._started:
                self._flush()

    def pause_writing(self) -> None:
        # Whoever does not read is not heard, either: so answers, also those to pings and settings, do not pile up.
        if self._transport is not None:
            self._transport.pause_reading()

    def resume_writing(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()

    def connection_lost(self, error: Exception | None) -> None:
        self._transport = None
        for number in list(self._streams):
            self._forget(number)
        self._on_lost(self)

    def leave(self) -> None:
        """Take no more requests, and tell the peer."""
        self._leaving = True
        self._output.append(frames.goaway(self._last, Code.NO_ERROR))
        self._flush()

    @property
    def answering(self) -> list[asyncio.Task[None]]:
        """What is under way."""
        return [stream.answering for stream in self._streams.values() if stream.answering is not None]

    def close(self) -> None:
        """End it, and what is under way."""
        if self._transport is not None:
            self._transport.close()
        for number in list(self._streams):
            self._forget(number)

    def _flush(self) -> None:
        if self._output and self._transport is not None and not self._transport.is_closing():
            self._transport.writelines(self._output)
        self._output = []  # the transport may keep the other

    # What comes in

    def _take(self) -> None:
        """Take all frames that are there whole."""
        data, at = self._input, 0
        if not self._started:
            start = bytes(data[: len(frames.PREFACE)])
            if not frames.PREFACE.startswith(start):
                self._log("warning", "closed a connection that does not speak gRPC", first_byte=data[0])
                self._input.clear()
                self.close()
                return
            if len(start) < len(frames.PREFACE):
                return
            self._started = True
            at = len(start)
        while len(data) - at >= frames.HEAD_SIZE:
            size, kind, flags, number = frames.parse_head(data, at)
            if size > FRAME:
                raise Violation(Code.FRAME_SIZE_ERROR, "a larger frame than was agreed upon")
            begin, end = at + frames.HEAD_SIZE, at + frames.HEAD_SIZE + size
            if len(data) < end:
                break
            try:
                self._frame_in(kind, flags, number, data[begin:end])
            except StreamError as error:
                self._output.append(frames.number(frames.RST_STREAM, error.stream, error.code))
                self._forget(error.stream)
            at = end
        del data[:at]

    def _frame_in(self, kind: int, flags: int, number: int, payload: bytearray) -> None:
        if not self._settled and (kind != frames.SETTINGS or flags & frames.ACK):
            raise Violation(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None and (kind != frames.CONTINUATION or number != self._block[0]):
            raise Violation(Code.PROTOCOL_ERROR, "a header block is broken off")
        if kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
            if number:
                raise Violation(Code.PROTOCOL_ERROR, "a frame of the connection's on a stream")
        elif kind not in (frames.WINDOW_UPDATE, *_UNKNOWN) and not number:
            raise Violation(Code.PROTOCOL_ERROR, "a frame of a stream's on none")
        taker = _TAKERS.get(kind)
        if taker is not None:
            taker(self, flags, number, payload)

    def _data(self, flags: int, number: int, payload: bytearray) -> None:
        # No more than a frame waits to be taken, and of a request only what the server wants is kept: so there is room
        # again at once, and who sends without asking is no danger.
        self._incoming -= len(payload)
        if self._incoming < WINDOW // 2:
            self._output.append(frames.number(frames.WINDOW_UPDATE, 0, WINDOW - self._incoming))
            self._incoming = WINDOW
        self._not_idle(number)
        stream = self._streams.get(number)
        if stream is None or stream.ended:
            raise StreamError(number, Code.STREAM_CLOSED)
        payload = unpadded(flags, payload)
        request = stream.request
        if stream.answering is None:  # else it is too long, and being answered for that
            request.body = request.body + payload if request.body else payload
        if flags & frames.END_STREAM:
            self._end(stream)
        elif len(request.body) > self._largest and stream.answering is None:
            self._answer(stream)

    def _headers(self, flags: int, number: int, payload: bytearray) -> None:
        if not number & 1:
            raise Violation(Code.PROTOCOL_ERROR, "a client's streams have odd numbers")
        payload = unpadded(flags, payload)
        if flags & frames.PRIORITIZED:
            self._priority(0, number, payload[:5])
            payload = payload[5:]
        self._block = number, flags, bytearray()
        self._continuation(flags, number, payload)

    def _continuation(self, flags: int, number: int, payload: bytearray) -> None:
        if self._block is None:
            raise Violation(Code.PROTOCOL_ERROR, "CONTINUATION of nothing")
        _, first, block = self._block
        block += payload
        if len(block) > HEADERS:
            raise Violation(Code.ENHANCE_YOUR_CALM, "a larger header block than anybody needs")
        if flags & frames.END_HEADERS:
            self._block = None
            self._fields(number, bool(first & frames.END_STREAM), bytes(block))

    def _fields(self, number: int, ends: bool, block: bytes) -> None:
        """A header block, whole: a request's, or what comes after its body."""
        try:
            fields = self._decoder.decode(block)  # also of what is refused: the table has to keep up
        except HpackError as error:
            raise Violation(Code.COMPRESSION_ERROR, str(error)) from None
        stream = self._streams.get(number)
        if stream is not None:
            if stream.ended:
                raise StreamError(number, Code.STREAM_CLOSED)
            if not ends or any(name.startswith(b":") for name, _ in fields):
                raise StreamError(number, Code.PROTOCOL_ERROR)
            self._end(stream)
            return
        if number <= self._last:
            raise Violation(Code.STREAM_CLOSED, "HEADERS on a stream that has ended")
        self._last = number
        if self._leaving or len(self._streams) >= STREAMS:
            raise StreamError(number, Code.REFUSED_STREAM)
        headers = checked(fields)
        if headers is None:
            raise StreamError(number, Code.PROTOCOL_ERROR)
        stream = self._streams[number] = _Stream(number, Request(headers), self._stream_window)
        if ends:
            self._end(stream)

    def _priority(self, flags: int, number: int, payload: bytearray) -> None:
        """Priorities are deprecated, and mean nothing here."""
        if len(payload) != 5:
            raise StreamError(number, Code.FRAME_SIZE_ERROR)
        if int.from_bytes(payload[:4], "big") & frames.LARGEST_WINDOW == number:
            raise StreamError(number, Code.PROTOCOL_ERROR)

    def _rst_stream(self, flags: int, number: int, payload: bytearray) -> None:
        if len(payload) != 4:
            raise Violation(Code.FRAME_SIZE_ERROR, "RST_STREAM of a wrong size")
        self._not_idle(number)
        self._forget(number)

    def _settings(self, flags: int, number: int, payload: bytearray) -> None:
        self._settled = True
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise Violation(Code.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        if flags & frames.ACK:
            return
        for name, value in frames.parse_settings(payload):
            if name == frames.ENABLE_PUSH and value > 1:
                raise Violation(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
            if name == frames.MAX_FRAME_SIZE:
                if not frames.FRAME_SIZE <= value <= frames.LARGEST_FRAME_SIZE:
                    raise Violation(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE out of its range")
                self._frame = value
            if name == frames.INITIAL_WINDOW_SIZE:
                more, self._stream_window = value - self._stream_window, value
                for stream in self._streams.values():
                    stream.window += more
                if value > frames.LARGEST_WINDOW or any(
                    stream.window > frames.LARGEST_WINDOW for stream in self._streams.values()
                ):
                    raise Violation(Code.FLOW_CONTROL_ERROR, "a window larger than any can be")
        self._output.append(frames.head(0, frames.SETTINGS, frames.ACK))
        self._go_on()

    def _ping(self, flags: int, number: int, payload: bytearray) -> None:
        if len(payload) != 8:
            raise Violation(Code.FRAME_SIZE_ERROR, "PING of a wrong size")
        if not flags & frames.ACK:
            self._output += frames.head(8, frames.PING, frames.ACK), payload

    def _push_promise(self, flags: int, number: int, payload: bytearray) -> None:
        raise Violation(Code.PROTOCOL_ERROR, "a client promises nothing")

    def _window_update(self, flags: int, number: int, payload: bytearray) -> None:
        if len(payload) != 4:
            raise Violation(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong size")
        more = int.from_bytes(payload, "big") & frames.LARGEST_WINDOW
        if not number:
            self._window += more
            if not more or self._window > frames.LARGEST_WINDOW:
                code = Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR
                raise Violation(code, "a window that grows by nothing, or beyond what it can be")
            self._go_on()
            return
        self._not_idle(number)
        stream = self._streams.get(number)
        if stream is None:
            return  # it has just ended
        stream.window += more
        if not more or stream.window > frames.LARGEST_WINDOW:
            raise StreamError(number, Code.FLOW_CONTROL_ERROR if more else Code.PROTOCOL_ERROR)
        if number in self._waiting:
            self._send(stream)

    def _not_idle(self, number: int) -> None:
        if number > self._last or not number & 1:
            raise Violation(Code.PROTOCOL_ERROR, "a frame on a stream that was never opened")

    # Answers

    def _end(self, stream: _Stream) -> None:
        """All of a request is there."""
        stream.ended = True
        if stream.answering is not None:
            return
        length = stream.request.headers.get(b"content-length")
        if length is not None and length != b"%d" % len(stream.request.body):
            raise StreamError(stream.number, Code.PROTOCOL_ERROR)
        self._answer(stream)

    def _answer(self, stream: _Stream) -> None:
        stream.answering = asyncio.get_running_loop().create_task(self._answered(stream))

    async def _answered(self, stream: _Stream) -> None:
        response = await self._serve(stream.request)
        if self._streams.get(stream.number) is not stream:
            return
        only = not response.body and not response.trailers
        flags = frames.END_HEADERS | (frames.END_STREAM if only else 0)
        self._output += frames.head(len(response.head), frames.HEADERS, flags, stream.number), response.head
        if only:
            self._done(stream)
        else:
            stream.pieces.extend(memoryview(piece) for piece in response.body if piece)
            stream.trailers = response.trailers
            self._send(stream)
        self._flush()

    def _go_on(self) -> None:
        """There may be room now: each that waits gets some, the one that got most last time comes last."""
        for stream in list(self._waiting.values()):
            if self._window <= 0:
                break
            self._send(stream)

    def _send(self, stream: _Stream) -> None:
        """Send of an answer's rest what there is room for."""
        self._waiting.pop(stream.number, None)
        pieces = stream.pieces
        while pieces:
            room = min(self._window, stream.window, self._frame)
            if room <= 0:
                self._waiting[stream.number] = stream
                return
            parts: list[Buffer] = []
            size = 0
            while pieces and size < room:
                part = pieces[0][: room - size]
                if len(part) == len(pieces[0]):
                    pieces.popleft()
                else:
                    pieces[0] = pieces[0][len(part) :]
                parts.append(part)
                size += len(part)
            last = not pieces and not stream.trailers
            self._output.append(frames.head(size, frames.DATA, frames.END_STREAM if last else 0, stream.number))
            self._output += parts
            self._window -= size
            stream.window -= size
        if stream.trailers:
            flags = frames.END_HEADERS | frames.END_STREAM
            head = frames.head(len(stream.trailers), frames.HEADERS, flags, stream.number)
            self._output += head, stream.trailers
        self._done(stream)

    def _done(self, stream: _Stream) -> None:
        """All of an answer is sent."""
        del self._streams[stream.number]
        if not stream.ended:  # it has heard enough (section 8.1)
            self._output.append(frames.number(frames.RST_STREAM, stream.number, Code.NO_ERROR))

    def _forget(self, number: int) -> None:
        """A stream has ended before its time."""
        stream = self._streams.pop(number, None)
        self._waiting.pop(number, None)
        if stream is not None and stream.answering is not None:
            stream.answering.cancel()


#: Frames of types that nobody has thought of yet are passed over (section 4.1).
_UNKNOWN = range(frames.CONTINUATION + 1, 256)

_TAKERS = {
    frames.DATA: Connection._data,
    frames.HEADERS: Connection._headers,
    frames.PRIORITY: Connection._priority,
    frames.RST_STREAM: Connection._rst_stream,
    frames.SETTINGS: Connection._settings,
    frames.PUSH_PROMISE: Connection._push_promise,
    frames.PING: Connection._ping,
    frames.WINDOW_UPDATE: Connection._window_update,
    frames.CONTINUATION: Connection._continuation,
}
