"""HTTP/2's frames, settings and error codes.  Source: RFC 9113, sections 4, 6 and 7."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

#: The upper eight and the lower sixteen of the length's 24 bits; type, flags, stream.
_HEADER = struct.Struct(">BHBBL")
HEADER_SIZE = _HEADER.size

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

ACK, END_STREAM, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
_SETTING = struct.Struct(">HL")

#: The initial values of a window and of the largest frame (section 6.5.2).
DEFAULT_WINDOW, DEFAULT_FRAME_SIZE = (1 << 16) - 1, 1 << 14

#: The maximum settings of a window and of the frame size.
LARGEST_WINDOW, LARGEST_FRAME_SIZE = (1 << 31) - 1, (1 << 24) - 1


class Code(IntEnum):
    """Error codes (section 7): why a stream or a connection is closed."""

    NO_ERROR = 0x0
    PROTOCOL_ERROR = 0x1
    INTERNAL_ERROR = 0x2
    FLOW_CONTROL_ERROR = 0x3
    STREAM_CLOSED = 0x5
    FRAME_SIZE_ERROR = 0x6
    REFUSED_STREAM = 0x7
    CANCEL = 0x8
    COMPRESSION_ERROR = 0x9
    ENHANCE_YOUR_CALM = 0xB


def header(size: int, kind: int, flags: int = 0, stream_id: int = 0) -> bytes:
    """Encode the header of a frame with a payload of the given size."""
    return _HEADER.pack(size >> 16, size & 0xFFFF, kind, flags, stream_id)


def parse_header(data: bytes | bytearray, at: int) -> tuple[int, int, int, int]:
    """Decode a frame's header: the payload's size, type, flags and stream id."""
    high, low, kind, flags, stream_id = _HEADER.unpack_from(data, at)
    return high << 16 | low, kind, flags, stream_id & LARGEST_WINDOW


def number(kind: int, stream_id: int, value: int) -> bytes:
    """Encode a frame whose payload is a 32-bit number: WINDOW_UPDATE or RST_STREAM."""
    return header(4, kind, 0, stream_id) + value.to_bytes(4, "big")


def settings(values: dict[int, int]) -> bytes:
    """Encode a SETTINGS frame."""
    return header(_SETTING.size * len(values), SETTINGS) + b"".join(_SETTING.pack(*pair) for pair in values.items())


def parse_settings(payload: bytes | bytearray) -> list[tuple[int, int]]:
    """Decode a SETTINGS payload, whose size is a multiple of six, in its order."""
    return list(_SETTING.iter_unpack(payload))


def goaway(last_stream_id: int, code: Code, text: str = "") -> bytes:
    """Encode a GOAWAY frame: the last stream that was handled, the error code, and debug data."""
    detail = text.encode()
    payload = last_stream_id.to_bytes(4, "big") + code.to_bytes(4, "big") + detail
    return header(len(payload), GOAWAY) + payload


class StreamError(Exception):
    """An error that closes one stream (section 5.4.2)."""

    def __init__(self, stream_id: int, code: Code) -> None:
        super().__init__(stream_id, code)
        self.stream_id = stream_id
        self.code = code


class ProtocolError(Exception):
    """An error that closes the connection (section 5.4.1)."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


def unpadded(flags: int, payload: bytearray) -> bytearray:
    """Return a payload without its padding (section 6.1).  Raises ProtocolError."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise ProtocolError(Code.PROTOCOL_ERROR, "the padding exceeds the payload")
    return payload[1 : len(payload) - payload[0]]
