"""A ttrpc client for threads: concurrent calls over one connection, without an event loop.

For commands that finish before asyncio would be imported.  Hostile servers are handled as in client.py.
"""

from __future__ import annotations

# Only C modules: socket, threading and queue would take as long to import as everything else that a short command
# needs.
from _queue import Empty, SimpleQueue
from _socket import AF_UNIX, SHUT_RDWR, socket
from _thread import allocate_lock, start_new_thread

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.responses import MAX_STREAM_ID, ConnectionClosed, RpcError, payload_view

TYPE_CHECKING = False
if TYPE_CHECKING:
    import os
    from collections.abc import Callable, Sequence
    from typing import Self, TypeVar

    T = TypeVar("T")

    #: Receives the response of a call; None if the connection closed before it.
    Deliver = Callable[[frames.Frame | None], None]

#: Bytes received at once.
RECEIVE = 256 << 10

#: Seconds after which a wait is repeated: a signal that arrives just before it does not end it.
SIGNAL_INTERVAL = 0.5


class BlockingClient:
    """A connection to a ttrpc server; its own thread receives responses."""

    def __init__(self, connected: socket) -> None:
        """Speak over a connected stream socket, which it then owns."""
        self._socket = connected
        self._sending = allocate_lock()
        self._waiting: dict[int, Deliver] = {}
        self._next_id = 1
        self._closed = False
        start_new_thread(self._receive, ())

    @classmethod
    def connect(cls, path: str | os.PathLike[str]) -> Self:
        """Connect to a Unix socket.  Raises OSError."""
        connected = socket(AF_UNIX)
        try:
            connected.connect(str(path))
            return cls(connected)
        except BaseException:
            connected.close()
            raise

    def close(self) -> None:
        """Close the connection; calls in progress raise ConnectionClosed."""
        self._shut_down()

    def call(self, service: str, method: str, payload: bytes, timeout: float | None = None) -> bytes:
        """Call a method with an encoded request and wait up to ``timeout`` seconds for the encoded response.

        Raises RpcError, ConnectionClosed, and ValueError for a request that is too long.
        """
        answers: SimpleQueue[frames.Frame | None] = SimpleQueue()
        self.post(service, method, [payload], answers.put)
        try:
            return received(take(answers) if timeout is None else answers.get(timeout=timeout))
        except Empty:
            raise RpcError(StatusCode.DEADLINE_EXCEEDED, f"{method}: no response within {timeout:g} s") from None

    def post(self, service: str, method: str, pieces: Sequence[frames.Buffer], deliver: Deliver) -> None:
        """Send a request, given as its pieces, and return; they can be overwritten then.

        ``deliver`` is called once, by the receiving thread, and must not block.  Raises ConnectionClosed, and
        ValueError for a request that is too long.
        """
        with self._sending:
            if self._closed or self._next_id > MAX_STREAM_ID:
                raise ConnectionClosed
            stream_id, self._next_id = self._next_id, self._next_id + 2
            request = frames.request_pieces(stream_id, service, method, pieces)
            self._waiting[stream_id] = deliver
            try:
                sent = self._socket.sendmsg(request)
                if sent < sum(map(len, request)):  # interrupted by a signal
                    self._socket.sendall(memoryview(b"".join(request))[sent:])
            except BaseException as error:
                self._waiting.pop(stream_id, None)  # the response may be here already
                self._shut_down()  # a partial request was sent: nothing can follow it
                if isinstance(error, OSError):
                    raise ConnectionClosed from error
                raise

    def _receive(self) -> None:
        reader = frames.FrameReader()
        try:
            while self._receive_into(reader):
                while (frame := reader.next()) is not None:
                    deliver = self._waiting.pop(frame.stream_id, None) if frame.kind == frames.RESPONSE else None
                    if deliver is not None:  # otherwise nobody has called
                        deliver(frame)
        except OSError:
            pass  # as at the connection's end
        self._shut_down()  # a call that is being sent ends, too
        with self._sending:
            self._closed = True
            left, self._waiting = self._waiting, {}
        for deliver in left.values():
            deliver(None)
        self._socket.close()

    def _receive_into(self, reader: frames.FrameReader) -> int:
        """Receive once, the data of a long frame into its own buffer; returns the number of bytes, 0 at the end."""
        if room := reader.room():
            count = self._socket.recv_into(room)
            reader.received(count)
            return count
        data = self._socket.recv(RECEIVE)
        if data:
            reader.feed(data)
        return len(data)

    def _shut_down(self) -> None:
        try:
            self._socket.shutdown(SHUT_RDWR)
        except OSError:
            pass  # the peer was faster


def take(queue: SimpleQueue[T]) -> T:
    """Wait for an item and take it; signals are handled meanwhile."""
    while True:
        try:
            return queue.get(timeout=SIGNAL_INTERVAL)
        except Empty:
            pass


def received(frame: frames.Frame | None) -> bytes:
    """Return the payload of a delivered response.  Raises RpcError, ConnectionClosed."""
    return bytes(received_view(frame))


def received_view(frame: frames.Frame | None) -> memoryview:
    """Return the payload of a delivered response where it was received.  Raises RpcError, ConnectionClosed."""
    if frame is None:
        raise ConnectionClosed
    return payload_view(frame)
