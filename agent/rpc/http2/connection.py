"""A server's HTTP/2 connection: frames, streams, flow control.  Source: RFC 9113.

A request is passed on when it is complete, and its response is sent as a whole: gRPC's unary calls need no more.  Input
is not trusted: every length, window and order is checked, and the memory that a peer can use is bounded.
"""

from __future__ import annotations

from caisson.agent.rpc.connection import MAX_CALLS, MAX_HELD, Connection
from caisson.agent.rpc.http2 import frames
from caisson.agent.rpc.http2.frames import Code, ProtocolError, StreamError, unpadded
from caisson.agent.rpc.http2.hpack import Decoder, HpackError
from caisson.agent.rpc.http2.messages import HttpRequest, HttpResponse, request_headers
from caisson.agent.rpc.http2.streams import FlowControl, Stream

TYPE_CHECKING = False
if TYPE_CHECKING:
    import asyncio
    from collections.abc import Awaitable, Callable

    from caisson.agent.base.log import Log

#: Receive windows in bytes: of one stream, and of the connection.
WINDOW = 1 << 24

#: The largest accepted frame: a request with 1 MiB of input takes two.
MAX_FRAME_SIZE = 1 << 20

#: Bytes of a field section, encoded and as they count (section 6.5.2).
MAX_HEADER_LIST_SIZE = 1 << 16

#: Maximum CONTINUATION frames of a field block, and empty DATA frames of a request: each costs time.
MAX_CONTINUATIONS = 64
MAX_EMPTY_FRAMES = 64

#: Entries of a SETTINGS frame: there are six settings.
MAX_SETTINGS = 64


class _FieldBlock:
    """A field block whose END_HEADERS has not arrived yet (section 4.3)."""

    def __init__(self, stream_id: int, ends_stream: bool) -> None:
        self.stream_id = stream_id
        self.ends_stream = ends_stream
        self.data = bytearray()
        self.frames = 0


class Http2Connection(Connection):
    """Serves one peer.

    ``serve`` answers a request; it is cancelled if the peer resets the stream or disconnects.  ``max_body``: maximum
    bytes of a request's body; a longer one is truncated and served at once.
    """

    def __init__(
        self,
        serve: Callable[[HttpRequest], Awaitable[HttpResponse]],
        max_body: int,
        buffer: memoryview,
        log: Log,
        on_lost: Callable[[Connection], None],
    ) -> None:
        super().__init__(buffer, log, on_lost)
        self._serve = serve
        self._max_body = max_body
        self._input = bytearray()
        self._preface_received = False
        self._settings_received = False
        self._leaving = False
        self._decoder = Decoder(MAX_HEADER_LIST_SIZE)
        self._block: _FieldBlock | None = None
        self._streams: dict[int, Stream] = {}
        self._flow = FlowControl(self.write, self._release, self._finish_stream)
        self._reset_ids: dict[int, None] = {}  # streams recently reset from here, oldest first
        self._last_stream_id = 0
        self._incoming_window = WINDOW

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Sent after the client's preface: a peer of another protocol must not get it.
        self.write(
            frames.settings(
                {
                    frames.MAX_CONCURRENT_STREAMS: MAX_CALLS,
                    frames.INITIAL_WINDOW_SIZE: WINDOW,
                    frames.MAX_FRAME_SIZE: MAX_FRAME_SIZE,
                    frames.MAX_HEADER_LIST_SIZE: MAX_HEADER_LIST_SIZE,
                }
            ),
            frames.number(frames.WINDOW_UPDATE, 0, WINDOW - frames.DEFAULT_WINDOW),
        )

    def connection_lost(self, error: Exception | None) -> None:
        for stream_id in list(self._streams):
            self._close_stream(stream_id)
        super().connection_lost(error)

    def drain(self) -> None:
        self._leaving = True
        self.write(frames.goaway(self._last_stream_id, Code.NO_ERROR))
        self.flush()

    def flush(self) -> None:
        if self._preface_received:
            super().flush()

    # Input

    def feed(self, data: memoryview) -> None:
        self._input += data

    def handle_frame(self) -> bool:
        try:
            return self._parse_frame() if self._preface_received else self._parse_preface()
        except ProtocolError as error:
            self.log("warning", "closed a connection that violates HTTP/2", error=str(error))
            self.write(frames.goaway(self._last_stream_id, error.code, str(error)))
            self.flush()
            self.close()
            return False

    def _parse_preface(self) -> bool:
        start = bytes(self._input[: len(frames.PREFACE)])
        if not frames.PREFACE.startswith(start):
            self.log("warning", "closed a connection that does not speak HTTP/2", first_byte=start[0])
            self._input.clear()
            self.close()
        elif len(start) == len(frames.PREFACE):
            del self._input[: len(start)]
            self._preface_received = True
        return self._preface_received

    def _parse_frame(self) -> bool:
        data = self._input
        if len(data) < frames.HEADER_SIZE:
            return False
        size, kind, flags, stream_id = frames.parse_header(data, 0)
        if size > MAX_FRAME_SIZE:
            raise ProtocolError(Code.FRAME_SIZE_ERROR, "a frame exceeds MAX_FRAME_SIZE")
        end = frames.HEADER_SIZE + size
        if len(data) < end:
            return False
        payload = data[frames.HEADER_SIZE : end]
        del data[:end]
        try:
            self._receive_frame(kind, flags, stream_id, payload)
        except StreamError as error:
            self._close_stream(error.stream_id)
            self._reset_stream(error.stream_id, error.code)
        return True

    def _receive_frame(self, kind: int, flags: int, stream_id: int, payload: bytearray) -> None:
        if not self._settings_received and (kind != frames.SETTINGS or flags & frames.ACK):
            raise ProtocolError(Code.PROTOCOL_ERROR, "the first frame is not SETTINGS")
        if self._block is not None and (kind != frames.CONTINUATION or stream_id != self._block.stream_id):
            raise ProtocolError(Code.PROTOCOL_ERROR, "a field block is interrupted")
        if kind in (frames.SETTINGS, frames.PING, frames.GOAWAY):
            if stream_id:
                raise ProtocolError(Code.PROTOCOL_ERROR, "a connection's frame on a stream")
        elif not stream_id and kind <= frames.CONTINUATION and kind != frames.WINDOW_UPDATE:
            raise ProtocolError(Code.PROTOCOL_ERROR, "a stream's frame on stream 0")
        receiver = _RECEIVERS.get(kind)
        if receiver is not None:
            receiver(self, flags, stream_id, payload)

    def _receive_data(self, flags: int, stream_id: int, payload: bytearray) -> None:
        # Replenish the window at once: memory is bounded by max_body and MAX_HELD, and exceeding those closes a
        # stream.  Withholding the window could let incomplete requests starve each other forever.
        self._incoming_window -= len(payload)
        if self._incoming_window < WINDOW // 2:
            self.write(frames.number(frames.WINDOW_UPDATE, 0, WINDOW - self._incoming_window))
            self._incoming_window = WINDOW
        self._check_not_idle(stream_id)
        stream = self._streams.get(stream_id)
        if stream is None or stream.ended:
            if stream_id in self._reset_ids:
                return  # it was in flight (section 5.1, closed)
            raise StreamError(stream_id, Code.STREAM_CLOSED)
        payload = unpadded(flags, payload)
        if not payload and not flags & frames.END_STREAM:
            stream.empty_frames += 1
            if stream.empty_frames > MAX_EMPTY_FRAMES:
                raise StreamError(stream_id, Code.ENHANCE_YOUR_CALM)
        if not stream.answering:  # otherwise it is too long, and an error is being sent
            self._hold(stream, len(payload))
            if stream.request.body:
                stream.request.body += payload
            else:
                stream.request.body = payload
        if flags & frames.END_STREAM:
            self._end_request(stream)
        elif len(stream.request.body) > self._max_body and not stream.answering:
            self._answer(stream)

    def _receive_headers(self, flags: int, stream_id: int, payload: bytearray) -> None:
        if not stream_id & 1:
            raise ProtocolError(Code.PROTOCOL_ERROR, "a client's stream id is even")
        payload = unpadded(flags, payload)
        if flags & frames.PRIORITIZED:
            self._receive_priority(0, stream_id, payload[:5])
            payload = payload[5:]
        self._block = _FieldBlock(stream_id, bool(flags & frames.END_STREAM))
        self._receive_continuation(flags, stream_id, payload)

    def _receive_continuation(self, flags: int, stream_id: int, payload: bytearray) -> None:
        block = self._block
        if block is None:
            raise ProtocolError(Code.PROTOCOL_ERROR, "CONTINUATION without HEADERS")
        block.data += payload
        block.frames += 1
        if len(block.data) > MAX_HEADER_LIST_SIZE or block.frames > MAX_CONTINUATIONS:
            raise ProtocolError(Code.ENHANCE_YOUR_CALM, "a field block exceeds its limits")
        if flags & frames.END_HEADERS:
            self._block = None
            self._receive_fields(block)

    def _receive_fields(self, block: _FieldBlock) -> None:
        """Handle a complete field block: a request's header, or its trailers."""
        try:
            fields = self._decoder.decode(bytes(block.data))  # even if rejected: the table must stay in sync
        except HpackError as error:
            raise ProtocolError(Code.COMPRESSION_ERROR, str(error)) from None
        stream_id = block.stream_id
        stream = self._streams.get(stream_id)
        if stream is not None:
            if stream.ended:
                raise StreamError(stream_id, Code.STREAM_CLOSED)
            if not block.ends_stream or any(name.startswith(b":") for name, _ in fields):
                raise StreamError(stream_id, Code.PROTOCOL_ERROR)
            self._end_request(stream)
            return
        if stream_id in self._reset_ids:
            return
        if stream_id <= self._last_stream_id:
            raise ProtocolError(Code.STREAM_CLOSED, "HEADERS on a closed stream")
        self._last_stream_id = stream_id
        if self._leaving or max(len(self._streams), len(self._calls)) >= MAX_CALLS:
            raise StreamError(stream_id, Code.REFUSED_STREAM)
        headers = request_headers(fields)
        if headers is None:
            raise StreamError(stream_id, Code.PROTOCOL_ERROR)
        stream = self._streams[stream_id] = Stream(stream_id, HttpRequest(headers), self._flow.initial_window)
        self._hold(stream, len(block.data))
        if block.ends_stream:
            self._end_request(stream)

    def _receive_priority(self, flags: int, stream_id: int, payload: bytearray) -> None:
        """Check a priority; they are deprecated, and ignored (section 5.3)."""
        if len(payload) != 5:
            raise StreamError(stream_id, Code.FRAME_SIZE_ERROR)
        if int.from_bytes(payload[:4], "big") & frames.LARGEST_WINDOW == stream_id:
            raise StreamError(stream_id, Code.PROTOCOL_ERROR)

    def _receive_rst_stream(self, flags: int, stream_id: int, payload: bytearray) -> None:
        if len(payload) != 4:
            raise ProtocolError(Code.FRAME_SIZE_ERROR, "RST_STREAM of a wrong size")
        self._check_not_idle(stream_id)
        self._close_stream(stream_id)

    def _receive_settings(self, flags: int, stream_id: int, payload: bytearray) -> None:
        self._settings_received = True
        if len(payload) % 6 or (flags & frames.ACK and payload):
            raise ProtocolError(Code.FRAME_SIZE_ERROR, "SETTINGS of a wrong size")
        if flags & frames.ACK:
            return
        if len(payload) > 6 * MAX_SETTINGS:
            raise ProtocolError(Code.ENHANCE_YOUR_CALM, "SETTINGS with too many entries")
        self._flow.apply_settings(frames.parse_settings(payload), self._streams.values())
        self.write(frames.header(0, frames.SETTINGS, frames.ACK))
        self._flow.resume_blocked()

    def _receive_ping(self, flags: int, stream_id: int, payload: bytearray) -> None:
        if len(payload) != 8:
            raise ProtocolError(Code.FRAME_SIZE_ERROR, "PING of a wrong size")
        if not flags & frames.ACK:
            self.write(frames.header(8, frames.PING, frames.ACK), payload)

    def _receive_push_promise(self, flags: int, stream_id: int, payload: bytearray) -> None:
        raise ProtocolError(Code.PROTOCOL_ERROR, "PUSH_PROMISE from a client")

    def _receive_window_update(self, flags: int, stream_id: int, payload: bytearray) -> None:
        if len(payload) != 4:
            raise ProtocolError(Code.FRAME_SIZE_ERROR, "WINDOW_UPDATE of a wrong size")
        increment = int.from_bytes(payload, "big") & frames.LARGEST_WINDOW
        if not stream_id:
            self._flow.grow_connection_window(increment)
            return
        self._check_not_idle(stream_id)
        stream = self._streams.get(stream_id)
        if stream is not None:  # otherwise it was just closed
            self._flow.grow_stream_window(stream, increment)

    def _check_not_idle(self, stream_id: int) -> None:
        if stream_id > self._last_stream_id or not stream_id & 1:
            raise ProtocolError(Code.PROTOCOL_ERROR, "a frame on an idle stream")

    # Requests and responses

    def _end_request(self, stream: Stream) -> None:
        stream.ended = True
        if stream.answering:
            return
        length = stream.request.headers.get(b"content-length")
        if length is not None and length != b"%d" % len(stream.request.body):
            raise StreamError(stream.id, Code.PROTOCOL_ERROR)
        self._answer(stream)

    def _answer(self, stream: Stream) -> None:
        stream.answering = True
        self.start_call(stream.id, self._call(stream))

    async def _call(self, stream: Stream) -> None:
        try:
            response = await self._serve(stream.request)
        finally:
            self.end_call(stream.id)
        if self._streams.get(stream.id) is not stream:
            return
        size = sum(map(len, response.body))
        self.held += size - stream.held  # free its request
        stream.held = size
        self._flow.start(stream, response)
        self.flush()

    def _hold(self, stream: Stream, size: int) -> None:
        """Count bytes held for a stream.  Raises StreamError beyond MAX_HELD."""
        stream.held += size
        self.held += size
        if self.held > MAX_HELD:
            raise StreamError(stream.id, Code.ENHANCE_YOUR_CALM)

    def _release(self, stream: Stream, size: int) -> None:
        stream.held -= size
        self.held -= size

    def _finish_stream(self, stream: Stream) -> None:
        """Forget a stream whose response is sent."""
        self._release(stream, stream.held)
        del self._streams[stream.id]
        if not stream.ended:  # the rest of the request is not needed (section 8.1)
            self._reset_stream(stream.id, Code.NO_ERROR)

    def _close_stream(self, stream_id: int) -> None:
        """Forget a stream before its response is sent, and cancel its call."""
        stream = self._streams.pop(stream_id, None)
        self._flow.blocked.pop(stream_id, None)
        if stream is not None:
            self._release(stream, stream.held)
            self.cancel_call(stream_id)

    def _reset_stream(self, stream_id: int, code: Code) -> None:
        """Send RST_STREAM, and ignore what the peer sends on the stream before it receives that."""
        self.write(frames.number(frames.RST_STREAM, stream_id, code))
        self._reset_ids[stream_id] = None
        if len(self._reset_ids) > MAX_CALLS:
            del self._reset_ids[next(iter(self._reset_ids))]


#: Frames of other types are ignored (section 4.1), and so is GOAWAY.
_RECEIVERS = {
    frames.DATA: Http2Connection._receive_data,
    frames.HEADERS: Http2Connection._receive_headers,
    frames.PRIORITY: Http2Connection._receive_priority,
    frames.RST_STREAM: Http2Connection._receive_rst_stream,
    frames.SETTINGS: Http2Connection._receive_settings,
    frames.PUSH_PROMISE: Http2Connection._receive_push_promise,
    frames.PING: Http2Connection._receive_ping,
    frames.WINDOW_UPDATE: Http2Connection._receive_window_update,
    frames.CONTINUATION: Http2Connection._receive_continuation,
}
