"""Protobuf's wire format, for programs that finish before protobuf would be imported.  Source: protobuf.dev, Encoding.

For messages of a few scalar fields; a test compares their field numbers with the schemas.
"""

from __future__ import annotations

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Iterable
    from typing import TypeVar

    Message = TypeVar("Message", bytes, memoryview)

#: Wire types; groups, which proto3 does not have, are rejected.
_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5

#: Bytes of a varint: ten of seven bits hold 64.
_MAX_VARINT = 10

#: Fields of a message: a hostile one of two bytes each would take fifty times its size in memory.
MAX_FIELDS = 1000


class WireError(ValueError):
    """An invalid encoded message."""


def varint(number: int) -> bytes:
    """Encode an integer, seven bits per byte, lowest first."""
    out = bytearray()
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def encode(fields: Iterable[tuple[int, int | str | bytes]]) -> bytes:
    """Encode a message's fields, given by number; zeros and empty strings are omitted, as in proto3.

    Strings may contain the surrogates of os.fsdecode(): the original bytes are sent.
    """
    out = bytearray()
    for number, value in fields:
        if not value:
            continue
        if isinstance(value, int):
            out += varint(number << 3 | _VARINT) + varint(value)
        else:
            data = value.encode(errors="surrogateescape") if isinstance(value, str) else value
            out += prefix(number, len(data))
            out += data
    return bytes(out)


def prefix(number: int, size: int) -> bytes:
    """Encode what precedes a field's data: strings, bytes and messages."""
    return varint(number << 3 | _BYTES) + varint(size)


def decode(message: Message) -> list[tuple[int, int | Message]]:
    """Return a message's fields in order: integers as sent, all others as parts of the message.

    Of a memoryview they are not copied.  Raises WireError.
    """
    fields: list[tuple[int, int | Message]] = []
    at = 0
    while at < len(message):
        if len(fields) == MAX_FIELDS:
            raise WireError(f"the message has more than {MAX_FIELDS} fields")
        key, at = _read_varint(message, at)
        kind = key & 7
        if kind == _VARINT:
            number, at = _read_varint(message, at)
            fields.append((key >> 3, number))
            continue
        if kind == _BYTES:
            size, at = _read_varint(message, at)
        elif kind in (_FIXED32, _FIXED64):
            size = 4 if kind == _FIXED32 else 8
        else:
            raise WireError(f"wire type {kind}: is not one of proto3")
        if size > len(message) - at:
            raise WireError("the message is truncated")
        fields.append((key >> 3, message[at : at + size]))
        at += size
    return fields


def views(message: memoryview, count: int) -> list[memoryview] | None:
    """Return the fields 1 to ``count`` of a message, without copying them.

    None if it does not consist of exactly these, each a string or bytes, in order: then use protobuf.
    """
    try:
        fields = decode(message)
    except WireError:
        return None
    found = [value for _, value in fields if isinstance(value, memoryview)]
    return found if [number for number, _ in fields] == list(range(1, count + 1)) and len(found) == count else None


def _read_varint(message: bytes | memoryview, at: int) -> tuple[int, int]:
    """Return the integer at this place, and the place after it."""
    number = 0
    for place, byte in enumerate(message[at : at + _MAX_VARINT]):
        number |= (byte & 0x7F) << (7 * place)
        if byte < 0x80:
            return number, at + place + 1
    raise WireError("the message is truncated, or a number is too long")


def value_of(message: Message, number: int) -> int | Message | None:
    """Return the last value of a field; None if it is absent.  Raises WireError."""
    return dict(decode(message)).get(number)
