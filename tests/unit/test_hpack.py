"""Test HPACK with the examples of its specification, and with input that a peer should not send."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from caisson.agent.rpc.http2.hpack import MAX_TABLE_SIZE, Decoder, HpackError, encode

LIMIT = 1 << 16

REQUESTS = [
    [(b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com")],
    [
        (b":method", b"GET"), (b":scheme", b"http"), (b":path", b"/"), (b":authority", b"www.example.com"),
        (b"cache-control", b"no-cache"),
    ],
    [
        (b":method", b"GET"), (b":scheme", b"https"), (b":path", b"/index.html"), (b":authority", b"www.example.com"),
        (b"custom-key", b"custom-value"),
    ],
]  # fmt: skip


@pytest.mark.parametrize(
    "blocks",
    [
        [
            "8286 8441 0f77 7777 2e65 7861 6d70 6c65 2e63 6f6d",
            "8286 84be 5808 6e6f 2d63 6163 6865",
            "8287 85bf 400a 6375 7374 6f6d 2d6b 6579 0c63 7573 746f 6d2d 7661 6c75 65",
        ],
        [
            "8286 8441 8cf1 e3c2 e5f2 3a6b a0ab 90f4 ff",
            "8286 84be 5886 a8eb 1064 9cbf",
            "8287 85bf 4088 25a8 49e9 5ba9 7d7f 8925 a849 e95b b8e8 b4bf",
        ],
    ],
    ids=["C.3", "C.4, Huffman's code"],
)
def test_the_examples_of_the_specification(blocks: list[str]) -> None:
    decoder = Decoder(LIMIT)
    assert [decoder.decode(bytes.fromhex(block)) for block in blocks] == REQUESTS


@pytest.mark.parametrize(
    ("block", "field"),
    [
        ("040c 2f73 616d 706c 652f 7061 7468", (b":path", b"/sample/path")),
        ("1008 7061 7373 776f 7264 0673 6563 7265 74", (b"password", b"secret")),
    ],
    ids=["C.2.2", "C.2.3"],
)
def test_a_field_that_is_not_indexed_stays_out_of_the_table(block: str, field: tuple[bytes, bytes]) -> None:
    decoder = Decoder(LIMIT)
    assert decoder.decode(bytes.fromhex(block)) == [field]
    with pytest.raises(HpackError):
        decoder.decode(b"\xbe")


def test_the_table_forgets_its_oldest_entries() -> None:
    def literal(name: bytes, size: int) -> bytes:
        return b"\x40" + bytes([len(name)]) + name + encode((b"", bytes(size)))[2:]

    decoder = Decoder(LIMIT)
    half = MAX_TABLE_SIZE // 2 - 32 - 1
    decoder.decode(literal(b"a", half) + literal(b"b", half))
    assert [name for name, _ in decoder.decode(b"\xbe\xbf")] == [b"b", b"a"]
    decoder.decode(literal(b"c", 1))
    assert [name for name, _ in decoder.decode(b"\xbe\xbf")] == [b"c", b"b"]
    with pytest.raises(HpackError):
        decoder.decode(b"\xc0")  # a
    decoder.decode(literal(b"d", MAX_TABLE_SIZE))  # too large for the table, which is then empty
    with pytest.raises(HpackError):
        decoder.decode(b"\xbe")
    decoder.decode(literal(b"e", 1))
    decoder.decode(b"\x20")  # a table size of 0
    with pytest.raises(HpackError):
        decoder.decode(b"\xbe")


@pytest.mark.parametrize(
    "block",
    [
        "80", "be", "ff 80 80 80 80 01", "ff 80", "7f ff ff ff ff ff 0f", "40", "40 05 61", "00 01 61",
        "00 01 61 02 61", "3f e2 1f", "88 20", "00 01 61 82 ff ff", "00 01 61 81 00", "00 01 61 84 ff ff ff ff",
        "00 01 61 81 fe",
    ],
)  # fmt: skip
def test_decoder_rejects_malformed_blocks(block: str) -> None:
    with pytest.raises(HpackError):
        Decoder(LIMIT).decode(bytes.fromhex(block))


def test_a_block_that_expands_beyond_the_limit() -> None:
    decoder = Decoder(10_000)
    decoder.decode(b"\x40\x01a" + encode((b"", bytes(3000)))[2:])
    assert len(decoder.decode(b"\xbe" * 3)) == 3
    with pytest.raises(HpackError, match="MAX_HEADER_LIST_SIZE"):
        decoder.decode(b"\xbe" * 4)


@given(st.lists(st.tuples(st.binary(max_size=300), st.binary(max_size=300)), max_size=5))
def test_encoder_round_trip(fields: list[tuple[bytes, bytes]]) -> None:
    assert Decoder(LIMIT).decode(encode(*fields)) == fields


@given(st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(block: bytes) -> None:
    decoder = Decoder(LIMIT)
    for _ in range(2):
        try:
            decoder.decode(block)
        except HpackError:
            return
