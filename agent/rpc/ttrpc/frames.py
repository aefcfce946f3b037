"""ttrpc's frames and messages, sans-IO.  Source: containerd/ttrpc, PROTOCOL.md and request.proto.

A frame is a header of ten bytes (length of its data, stream, type, flags; big-endian) and data.  A request's data is a
ttrpc.Request, a response's a ttrpc.Response.  There is no preface, no flow control and no way to cancel.
"""

from __future__ import annotations

import struct

from caisson.agent.rpc import wire
from caisson.agent.rpc.codes import StatusCode

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    Buffer = bytes | bytearray | memoryview

_HEADER = struct.Struct(">LLBB")
HEADER_SIZE = _HEADER.size

#: Maximum bytes of a frame's data: hence the first byte of a connection is always 0.
MAX_DATA = 4 << 20

#: Bytes of frame data from which they are received in place: below, copying is cheaper.
LONG = 1 << 17

REQUEST, RESPONSE, DATA = 1, 2, 3

#: Flags of streams with more than one request and one response.
REMOTE_CLOSED, REMOTE_OPEN, NO_DATA = 0x1, 0x2, 0x4

#: Prefix of a message type's name in the details of a status (google/protobuf/any.proto).
TYPE_URL = "type.googleapis.com/"

#: The field of a Response that holds the method's response.
_PAYLOAD = 2


class Frame:
    """A frame; ``data`` is None if it exceeded MAX_DATA, and was discarded.

    For a frame of LONG bytes or more that arrived in parts, it is a bytearray owned by the caller.
    """

    __slots__ = ("data", "flags", "kind", "length", "stream_id")

    def __init__(self, length: int, stream_id: int, kind: int, flags: int, data: bytes | bytearray | None) -> None:
        self.length = length
        self.stream_id = stream_id
        self.kind = kind
        self.flags = flags
        self.data = data


class FrameReader:
    """Split a byte stream into frames; holds at most the latest input and one frame."""

    def __init__(self) -> None:
        self._input: bytes | bytearray = b""  # bytes if all frames arrived complete, so that they are copied once
        self._at = 0  # what was returned
        self._discard = 0  # remaining bytes of an oversized frame
        self._long: Frame | None = None  # an incomplete one
        self._came = 0  # bytes of its data

    def feed(self, data: Buffer) -> None:
        """Take input, in pieces of any size."""
        if self._discard:
            skipped = min(self._discard, len(data))
            self._discard -= skipped
            data = memoryview(data)[skipped:]
        elif room := self.room():
            taken = min(len(room), len(data))
            room[:taken] = memoryview(data)[:taken]
            self.received(taken)
            data = memoryview(data)[taken:]
        if self._at == len(self._input):
            self._input = bytes(data)
        elif isinstance(self._input, bytearray):
            del self._input[: self._at]
            self._input += data
        else:
            self._input = bytearray(memoryview(self._input)[self._at :])
            self._input += data
        self._at = 0

    def room(self) -> memoryview | None:
        """Return the buffer for the next bytes of an incomplete long frame; None if there is none.

        They can be received there instead of being fed; report the number with ``received``.
        """
        if self._long is None or self._came == self._long.length:
            return None
        assert self._long.data is not None
        return memoryview(self._long.data)[self._came :]

    def received(self, count: int) -> None:
        """Record bytes that were received into ``room``."""
        self._came += count

    def next(self) -> Frame | None:
        """Return the next frame; None until there is more input."""
        if self._long is not None:
            if self._came < self._long.length:
                return None
            whole, self._long = self._long, None
            return whole
        begin = self._at + HEADER_SIZE
        if len(self._input) < begin:
            return None
        length, stream_id, kind, flags = _HEADER.unpack_from(self._input, self._at)
        end = begin + length
        if length > MAX_DATA:
            self._discard = max(0, end - len(self._input))
            self._at = min(end, len(self._input))
            return Frame(length, stream_id, kind, flags, None)
        if len(self._input) < end:
            if length >= LONG:
                self._long = Frame(length, stream_id, kind, flags, bytearray(length))
                self._came = 0
                rest, self._input, self._at = memoryview(self._input)[begin:], b"", 0
                self.feed(rest)
            return None
        data = bytes(memoryview(self._input)[begin:end])
        self._at = end
        if end == len(self._input):
            self._input, self._at = b"", 0
        return Frame(length, stream_id, kind, flags, data)


def frame(stream_id: int, kind: int, data: bytes, flags: int = 0) -> bytes:
    """Encode a frame."""
    return _HEADER.pack(len(data), stream_id, kind, flags) + data


def request(
    stream_id: int,
    service: str,
    method: str,
    payload: bytes,
    timeout: float | None = None,
    metadata: Iterable[tuple[str, str]] = (),
) -> bytes:
    """Encode a request's frame; ``timeout`` in seconds.  Raises ValueError if it exceeds MAX_DATA."""
    return b"".join(request_pieces(stream_id, service, method, [payload], timeout, metadata))


def request_pieces(
    stream_id: int,
    service: str,
    method: str,
    pieces: Sequence[Buffer],
    timeout: float | None = None,
    metadata: Iterable[tuple[str, str]] = (),
) -> list[Buffer]:
    """Encode a request's frame as ``request``, from the pieces of the method's request, without copying them."""
    size = sum(map(len, pieces))
    nanoseconds = 0 if timeout is None else max(1, int(timeout * 1e9))
    pairs = [(5, wire.encode([(1, key), (2, value)])) for key, value in metadata]
    before = wire.encode([(1, service), (2, method)]) + (wire.prefix(3, size) if size else b"")
    after = wire.encode([(4, nanoseconds), *pairs])
    length = len(before) + size + len(after)
    if length > MAX_DATA:
        raise ValueError(f"{service}/{method}: a request of {length} bytes; ttrpc carries {MAX_DATA}")
    return [_HEADER.pack(length, stream_id, REQUEST, 0) + before, *pieces, after]


def response(stream_id: int, pieces: Sequence[bytes]) -> list[bytes]:
    """Encode an OK response, given as the pieces of the method's response, without copying them.

    One that exceeds MAX_DATA becomes an error, as no frame can hold it.
    """
    size = sum(map(len, pieces))
    if not size:
        return [_HEADER.pack(0, stream_id, RESPONSE, 0)]
    prefix = wire.prefix(_PAYLOAD, size)
    length = len(prefix) + size
    if length > MAX_DATA:
        return [failure(stream_id, StatusCode.INVALID_ARGUMENT, too_long(length))]
    return [_HEADER.pack(length, stream_id, RESPONSE, 0) + prefix, *pieces]


def failure(stream_id: int, code: StatusCode, text: str, detail: tuple[str, bytes] | None = None) -> bytes:
    """Encode an error response; ``detail`` is a message for programs, by its full name and encoded."""
    fields: list[tuple[int, int | str | bytes]] = [(1, int(code)), (2, text)]
    if detail is not None:
        fields.append((3, wire.encode([(1, TYPE_URL + detail[0]), (2, detail[1])])))
    return frame(stream_id, RESPONSE, wire.encode([(1, wire.encode(fields))]))


def too_long(length: int) -> str:
    """Return the error text for a frame of this size, as other ttrpc servers write it."""
    return f"message length {length} exceed maximum message size of {MAX_DATA}"
