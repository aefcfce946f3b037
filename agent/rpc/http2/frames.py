"""HTTP/2's frames and settings by their names, and what is wrong with them.  Source: RFC 9113, sections 4, 6 and 7."""

from __future__ import annotations

import struct
from enum import IntEnum

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"

#: Of the 24 bits of the length the upper eight and the lower sixteen; type, flags, stream.
_HEAD = struct.Struct(">BHBBL")
HEAD_SIZE = _HEAD.size

DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)

ACK, END_STREAM, END_HEADERS, PADDED, PRIORITIZED = 0x1, 0x1, 0x4, 0x8, 0x20

HEADER_TABLE_SIZE, ENABLE_PUSH, MAX_CONCURRENT_STREAMS, INITIAL_WINDOW_SIZE, MAX_FRAME_SIZE, MAX_HEADER_LIST_SIZE = (
    range(1, 7)
)
_SETTING = struct.Struct(">HL")

#: What holds until a peer says otherwise.
WINDOW, FRAME_SIZE = (1 << 16) - 1, 1 << 14

#: What a window, and what a frame can be at most.
LARGEST_WINDOW, LARGEST_FRAME_SIZE = (1 << 31) - 1, (1 << 24) - 1


class Code(IntEnum):
    """Why a stream or a connection ends."""

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


def head(size: int, kind: int, flags: int = 0, stream: int = 0) -> bytes:
    """What stands before the payload of a frame."""
    return _HEAD.pack(size >> 16, size & 0xFFFF, kind, flags, stream)


def parse_head(data: bytes | bytearray, at: int) -> tuple[int, int, int, int]:
    """Size of the payload, type, flags and stream."""
    high, low, kind, flags, stream = _HEAD.unpack_from(data, at)
    return high << 16 | low, kind, flags, stream & LARGEST_WINDOW


def number(kind: int, stream: int, value: int) -> bytes:
    """A frame that holds a number: WINDOW_UPDATE, RST_STREAM."""
    return head(4, kind, 0, stream) + value.to_bytes(4, "big")


def settings(values: dict[int, int]) -> bytes:
    """A frame of settings."""
    return head(_SETTING.size * len(values), SETTINGS) + b"".join(_SETTING.pack(*pair) for pair in values.items())


def parse_settings(payload: bytes | bytearray) -> list[tuple[int, int]]:
    """What a frame of settings says, in its order.  Its size is a multiple of six."""
    return list(_SETTING.iter_unpack(payload))


def goaway(last: int, code: Code, text: str = "") -> bytes:
    """The frame that ends a connection: the last stream that was looked at, and why."""
    detail = text.encode()
    return head(8 + len(detail), GOAWAY) + last.to_bytes(4, "big") + code.to_bytes(4, "big") + detail


class StreamError(Exception):
    """One stream cannot go on."""

    def __init__(self, stream: int, code: Code) -> None:
        super().__init__(stream, code)
        self.stream = stream
        self.code = code


class Violation(Exception):
    """The connection cannot go on."""

    def __init__(self, code: Code, text: str) -> None:
        super().__init__(text)
        self.code = code


def unpadded(flags: int, payload: bytearray) -> bytearray:
    """A payload without its padding (section 6.1).  Raises Violation."""
    if not flags & PADDED:
        return payload
    if not payload or payload[0] >= len(payload):
        raise Violation(Code.PROTOCOL_ERROR, "more padding than frame")
    return payload[1 : len(payload) - payload[0]]
