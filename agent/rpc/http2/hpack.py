"""HPACK, the compression of HTTP/2's header fields.  Source: RFC 7541.

The encoder uses neither a dynamic table nor Huffman coding: it is stateless, and blocks can be encoded once.
"""

from __future__ import annotations

from functools import cache

#: Bytes of the dynamic table that a peer may fill: the initial value of SETTINGS_HEADER_TABLE_SIZE.
MAX_TABLE_SIZE = 4096

#: Bytes that an entry counts in addition to its name and value (section 4.1).
ENTRY_OVERHEAD = 32

#: Appendix A: name, or name=value.
_STATIC = (
    ":authority|:method=GET|:method=POST|:path=/|:path=/index.html|:scheme=http|:scheme=https|:status=200|"
    ":status=204|:status=206|:status=304|:status=400|:status=404|:status=500|accept-charset|"
    "accept-encoding=gzip, deflate|accept-language|accept-ranges|accept|access-control-allow-origin|age|allow|"
    "authorization|cache-control|content-disposition|content-encoding|content-language|content-length|"
    "content-location|content-range|content-type|cookie|date|etag|expect|expires|from|host|if-match|"
    "if-modified-since|if-none-match|if-range|if-unmodified-since|last-modified|link|location|max-forwards|"
    "proxy-authenticate|proxy-authorization|range|referer|refresh|retry-after|server|set-cookie|"
    "strict-transport-security|transfer-encoding|user-agent|vary|via|www-authenticate"
)
STATIC = tuple((name.encode(), value.encode()) for name, _, value in (one.partition("=") for one in _STATIC.split("|")))

#: Appendix B, as the code lengths of 0-255 and of end-of-string, in base 36: the code is canonical.
LENGTHS = (
    "dnsssssssoussussssssssusssssssss6aacd68baa8b8666555666666678f6cad67777777777777777777777878djde6"
    "f56565666577666567655677777fbedskmkkmmmnmnnnnnonoomnonnnnlmnmnnomlkmmnnlnmmolmnnllmlnmnnkmmmnmmn"
    "qqkjmnmpqqqrrqopjlqrrqrollqqsrrrkoklmllnmmppooqnqrqqrrrrrsrrrrrqu"
)
END_OF_STRING = 256


class HpackError(Exception):
    """A field block that cannot be decoded: the two sides' tables are out of sync from then on (section 2.2)."""


class Decoder:
    """Decode the field blocks of one connection, in their order."""

    def __init__(self, limit: int) -> None:
        """``limit``: bytes of the fields of one block, as section 4.1 counts them."""
        self._limit = limit
        self._size = 0
        self._max_size = MAX_TABLE_SIZE
        self._table: list[tuple[bytes, bytes]] = []  # newest first

    def decode(self, block: bytes) -> list[tuple[bytes, bytes]]:
        """Return a block's fields, names and values.  Raises HpackError, also beyond the limit."""
        fields: list[tuple[bytes, bytes]] = []
        size = at = 0
        while at < len(block):
            first = block[at]
            if first & 0x80:  # indexed (6.1)
                index, at = _integer(block, at, 7)
                field = self._entry(index)
            elif first & 0xE0 == 0x20:  # the table's size (6.3)
                if fields:
                    raise HpackError("a table size update after a field")
                self._max_size, at = _integer(block, at, 5)
                if self._max_size > MAX_TABLE_SIZE:
                    raise HpackError("a table size update beyond SETTINGS_HEADER_TABLE_SIZE")
                self._evict()
                continue
            else:  # literal: with indexing (6.2.1), without, never (6.2.2, 6.2.3)
                indexed = bool(first & 0x40)
                index, at = _integer(block, at, 6 if indexed else 4)
                if index:
                    name = self._entry(index)[0]
                else:
                    name, at = _string(block, at)
                value, at = _string(block, at)
                field = name, value
                if indexed:
                    self._table.insert(0, field)
                    self._size += _size(field)
                    self._evict()
            fields.append(field)
            size += _size(field)
            if size > self._limit:
                raise HpackError("the fields exceed MAX_HEADER_LIST_SIZE")
        return fields

    def _entry(self, index: int) -> tuple[bytes, bytes]:
        if 0 < index <= len(STATIC):
            return STATIC[index - 1]
        index -= len(STATIC) + 1
        if not 0 <= index < len(self._table):
            raise HpackError("invalid index")
        return self._table[index]

    def _evict(self) -> None:
        while self._size > self._max_size:
            self._size -= _size(self._table.pop())


def encode(*fields: tuple[bytes, bytes]) -> bytes:
    """Encode a field block: an index if the static table has the field, otherwise a literal without indexing."""
    block = bytearray()
    for name, value in fields:
        if (name, value) in STATIC:
            block.append(0x80 | STATIC.index((name, value)) + 1)
        else:
            block += b"\0" + _length(len(name)) + name + _length(len(value)) + value
    return bytes(block)


def _size(field: tuple[bytes, bytes]) -> int:
    return len(field[0]) + len(field[1]) + ENTRY_OVERHEAD


def _length(number: int) -> bytes:
    """Encode a string's length: an integer with a prefix of seven bits (5.1, 5.2)."""
    if number < 0x7F:
        return bytes([number])
    number -= 0x7F
    out = bytearray([0x7F])
    while number >= 0x80:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


def _integer(block: bytes, at: int, bits: int) -> tuple[int, int]:
    """Decode an integer (5.1); return it and where it ends."""
    most = (1 << bits) - 1
    number = block[at] & most
    at += 1
    if number < most:
        return number, at
    for shift in range(0, 28, 7):  # no sensible length or index has more bits
        if at >= len(block):
            break
        byte = block[at]
        at += 1
        number += (byte & 0x7F) << shift
        if byte < 0x80:
            return number, at
    raise HpackError("invalid integer: truncated, or too large")


def _string(block: bytes, at: int) -> tuple[bytes, int]:
    """Decode a string (5.2); return it and where it ends."""
    if at >= len(block):
        raise HpackError("truncated field")
    huffman = block[at] & 0x80
    length, at = _integer(block, at, 7)
    data = block[at : at + length]
    if len(data) < length:
        raise HpackError("truncated string")
    return (_huffman_decode(data) if huffman else data), at + length


@cache  # built on first use: every millisecond counts during the agent's start
def _codes() -> dict[int, int]:
    """Build the Huffman code (appendix B): code, with a bit set before it that keeps its zeros → symbol."""
    codes: dict[int, int] = {}
    code = before = 0
    for length, symbol in sorted((int(digit, 36), symbol) for symbol, digit in enumerate(LENGTHS)):
        code <<= length - before
        codes[1 << length | code] = symbol
        code += 1
        before = length
    return codes


#: The longest code has 30 bits, and the bit before them.
_TOO_LONG = 1 << 31


def _huffman_decode(data: bytes) -> bytes:
    """Decode a Huffman-coded string (5.2)."""
    codes = _codes()
    out = bytearray()
    code = 1
    for byte in data:
        for shift in range(7, -1, -1):
            code = code << 1 | byte >> shift & 1
            symbol = codes.get(code)
            if symbol is None:
                if code >= _TOO_LONG:
                    raise HpackError("invalid Huffman code")
                continue
            if symbol == END_OF_STRING:
                raise HpackError("the end-of-string symbol within a string")
            out.append(symbol)
            code = 1
    if code >= 1 << 8 or code & code + 1:  # padding: fewer than eight bits, all of them ones
        raise HpackError("invalid padding of a Huffman code")
    return bytes(out)
