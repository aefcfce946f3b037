"""Streams, and sending responses within flow control.  Source: RFC 9113, sections 5.2 and 6.9."""

from __future__ import annotations

from collections import deque

from caisson.agent.rpc.http2 import frames
from caisson.agent.rpc.http2.frames import Code, ProtocolError, StreamError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from caisson.agent.rpc.http2.messages import Buffer, HttpRequest, HttpResponse


class Stream:
    """A request, and the part of its response that waits for flow control."""

    def __init__(self, stream_id: int, request: HttpRequest, window: int) -> None:
        self.id = stream_id
        self.request = request
        self.window = window  # the peer's window in bytes
        self.ended = False  # END_STREAM was received
        self.answering = False
        self.empty_frames = 0
        self.held = 0  # bytes of its request and of the rest of its response
        self.pieces: deque[memoryview] = deque()
        self.trailers = b""


class FlowControl:
    """Send responses within the peer's windows and frame size.

    ``write`` queues output; ``sent`` is called with a stream and the number of bytes of its response that were sent,
    ``finished`` with a stream whose response is complete.
    """

    def __init__(
        self,
        write: Callable[..., None],
        sent: Callable[[Stream, int], None],
        finished: Callable[[Stream], None],
    ) -> None:
        self._write = write
        self._sent = sent
        self._finished = finished
        self._window = frames.DEFAULT_WINDOW  # of the connection
        self._frame_size = frames.DEFAULT_FRAME_SIZE
        self.blocked: dict[int, Stream] = {}
        self.initial_window = frames.DEFAULT_WINDOW  # of a new stream

    def start(self, stream: Stream, response: HttpResponse) -> None:
        """Send a response, as far as the windows allow."""
        only = not response.body and not response.trailers
        flags = frames.END_HEADERS | (frames.END_STREAM if only else 0)
        self._write(frames.header(len(response.header), frames.HEADERS, flags, stream.id), response.header)
        if only:
            self._finished(stream)
            return
        stream.pieces.extend(memoryview(piece) for piece in response.body if piece)
        stream.trailers = response.trailers
        self.resume(stream)

    def resume(self, stream: Stream) -> None:
        """Send more of a response."""
        self.blocked.pop(stream.id, None)
        while stream.pieces:
            room = min(self._window, stream.window, self._frame_size)
            if room <= 0:
                self.blocked[stream.id] = stream
                return
            parts, size = _take(stream.pieces, room)
            last = not stream.pieces and not stream.trailers
            self._write(frames.header(size, frames.DATA, frames.END_STREAM if last else 0, stream.id), *parts)
            self._window -= size
            stream.window -= size
            self._sent(stream, size)
        if stream.trailers:
            flags = frames.END_HEADERS | frames.END_STREAM
            self._write(frames.header(len(stream.trailers), frames.HEADERS, flags, stream.id), stream.trailers)
        self._finished(stream)

    def resume_blocked(self) -> None:
        """Send more of the waiting responses, one frame each in turn while the connection's window is small."""
        for stream in list(self.blocked.values()):
            if self._window <= 0:
                return
            self.resume(stream)

    def apply_settings(self, values: Iterable[tuple[int, int]], streams: Iterable[Stream]) -> None:
        """Apply the peer's settings (section 6.5.2), but send nothing yet.  Raises ProtocolError."""
        window = self.initial_window
        for name, value in values:
            if name == frames.ENABLE_PUSH and value > 1:
                raise ProtocolError(Code.PROTOCOL_ERROR, "ENABLE_PUSH is neither 0 nor 1")
            if name == frames.MAX_FRAME_SIZE:
                if not frames.DEFAULT_FRAME_SIZE <= value <= frames.LARGEST_FRAME_SIZE:
                    raise ProtocolError(Code.PROTOCOL_ERROR, "MAX_FRAME_SIZE is out of range")
                self._frame_size = value
            if name == frames.INITIAL_WINDOW_SIZE:
                if value > frames.LARGEST_WINDOW:
                    raise ProtocolError(Code.FLOW_CONTROL_ERROR, "INITIAL_WINDOW_SIZE exceeds 2^31-1")
                window = value
        change, self.initial_window = window - self.initial_window, window
        for stream in streams if change else ():
            stream.window += change
            if stream.window > frames.LARGEST_WINDOW:
                raise ProtocolError(Code.FLOW_CONTROL_ERROR, "a stream's window exceeds 2^31-1")

    def grow_connection_window(self, increment: int) -> None:
        """Apply a WINDOW_UPDATE of the connection (section 6.9.1).  Raises ProtocolError."""
        self._window += increment
        if not increment or self._window > frames.LARGEST_WINDOW:
            code = Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR
            raise ProtocolError(code, "a window increment of 0, or a window that exceeds 2^31-1")
        self.resume_blocked()

    def grow_stream_window(self, stream: Stream, increment: int) -> None:
        """Apply a WINDOW_UPDATE of a stream.  Raises StreamError."""
        stream.window += increment
        if not increment or stream.window > frames.LARGEST_WINDOW:
            raise StreamError(stream.id, Code.FLOW_CONTROL_ERROR if increment else Code.PROTOCOL_ERROR)
        if stream.id in self.blocked:
            self.resume(stream)


def _take(pieces: deque[memoryview], room: int) -> tuple[list[Buffer], int]:
    """Take up to the given number of bytes from the front, without copying."""
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
    return parts, size
