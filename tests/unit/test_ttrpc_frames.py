"""Test ttrpc's frames and messages, byte for byte, and input that no client sends."""

from __future__ import annotations

import random

import pytest

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc import frames
from caisson.agent.rpc.ttrpc.frames import HEADER_SIZE, LONG, MAX_DATA, Frame, FrameReader
from caisson.proto.ttrpc import ttrpc_pb2

#: Health.Check with a deadline and containerd's metadata, as containerd's own library (Go, 1.2.7) sends it.
CHECK = bytes.fromhex(
    "00000041 00000001 01 00"
    "0a0b 677270632e4865616c7468"  # service = 1: "grpc.Health"
    "1205 436865636b"  # method = 2: "Check"
    "20 fba388e16f"  # timeout_nano = 4
    "2a25 0a1a 636f6e7461696e6572642d6e616d6573706163652d7474727063 1207 64656661756c74"  # metadata = 5
)
NAMESPACE = ("containerd-namespace-ttrpc", "default")

#: HealthCheckResponse{status: SERVING}.
SERVING = b"\x08\x01"


def read(*pieces: bytes) -> list[tuple[int, int, int, int, bytes | None]]:
    reader, found = FrameReader(), []
    for piece in pieces:
        reader.feed(piece)
        while (one := reader.next()) is not None:
            found.append(fields(one))
    return found


def fields(one: Frame) -> tuple[int, int, int, int, bytes | None]:
    return one.length, one.stream_id, one.kind, one.flags, None if one.data is None else bytes(one.data)


def test_a_request_of_the_go_library_is_decoded() -> None:
    ((length, stream_id, kind, flags, data),) = read(CHECK)
    assert (length, stream_id, kind, flags) == (65, 1, frames.REQUEST, 0)
    request = ttrpc_pb2.Request.FromString(data or b"")
    assert (request.service, request.method, request.payload) == ("grpc.Health", "Check", b"")
    assert request.timeout_nano == 29_999_895_035
    assert [(one.key, one.value) for one in request.metadata] == [NAMESPACE]


def test_a_request_is_encoded_byte_for_byte() -> None:
    encoded = frames.request(1, "grpc.Health", "Check", b"", 30.0, [NAMESPACE])
    assert encoded == CHECK.replace(bytes.fromhex("fba388e16f"), bytes.fromhex("80d88ee16f"))
    assert frames.request(3, "s", "m", b"p") == bytes.fromhex("00000009 00000003 01 00 0a0173 12016d 1a0170")
    assert ttrpc_pb2.Request.FromString(frames.request(1, "s", "m", b"", 1e-12)[10:]).timeout_nano == 1


def test_responses_are_encoded_byte_for_byte() -> None:
    assert b"".join(frames.response(1, [])) == bytes.fromhex("00000000 00000001 02 00")
    assert b"".join(frames.response(1, [b""])) == bytes.fromhex("00000000 00000001 02 00")
    assert b"".join(frames.response(5, [SERVING])) == bytes.fromhex("00000004 00000005 02 00 1202 0801")
    failure = frames.failure(0x0102, StatusCode.NOT_FOUND, "no")
    assert failure == bytes.fromhex("00000008 00000102 02 00 0a06 0805 1202 6e6f")


@pytest.mark.parametrize("size", [1, 127, 128, 16383, 16384, MAX_DATA - 5])
def test_a_response_in_pieces_is_what_protobuf_writes(size: int) -> None:
    data = random.Random(size).randbytes(size)
    ((length, *_, body),) = read(b"".join(frames.response(1, [data[:1], data[1:]])))
    assert body == ttrpc_pb2.Response(payload=data).SerializeToString()
    assert length == len(body)


def test_a_response_that_no_frame_can_hold_is_an_error() -> None:
    (encoded,) = frames.response(7, [bytes(MAX_DATA - 4)])
    ((_, stream_id, kind, _, body),) = read(encoded)
    status = ttrpc_pb2.Response.FromString(body or b"").status
    assert (stream_id, kind, status.code) == (7, frames.RESPONSE, StatusCode.INVALID_ARGUMENT)
    assert status.message == "message length 4194305 exceed maximum message size of 4194304"


def test_a_request_that_no_frame_can_hold_is_refused() -> None:
    with pytest.raises(ValueError, match="s/m: a request of 4194315 bytes"):
        frames.request(1, "s", "m", bytes(MAX_DATA))


def test_frames_are_found_wherever_the_input_is_cut() -> None:
    whole = CHECK + frames.frame(3, 9, b"later type", 0xFF) + frames.frame(5, frames.REQUEST, b"")
    expected = read(whole)
    assert [one[1] for one in expected] == [1, 3, 5]
    assert read(*(bytes([byte]) for byte in whole)) == expected
    for cut in range(len(whole)):
        assert read(whole[:cut], whole[cut:]) == expected


@pytest.mark.parametrize("cut", [HEADER_SIZE - 1, HEADER_SIZE, HEADER_SIZE + 1, LONG, HEADER_SIZE + LONG, LONG + 20])
def test_a_long_frame_is_found_wherever_it_is_cut(cut: int) -> None:
    long = random.Random(cut).randbytes(LONG + 1)
    whole = frames.frame(1, frames.REQUEST, long) + CHECK + frames.frame(3, frames.REQUEST, long)
    expected = [(LONG + 1, 1, frames.REQUEST, 0, long), *read(CHECK), (LONG + 1, 3, frames.REQUEST, 0, long)]
    assert read(whole) == expected
    assert read(whole[:cut], whole[cut:]) == expected
    assert read(*(whole[at : at + cut] for at in range(0, len(whole), cut))) == expected


def test_the_rest_of_a_long_frame_is_received_in_its_place() -> None:
    long = random.Random(7).randbytes(LONG)
    encoded = frames.frame(1, frames.REQUEST, long)
    reader, at = FrameReader(), HEADER_SIZE + 5
    assert reader.room() is None
    reader.feed(encoded[:at])
    while (one := reader.next()) is None:
        room = reader.room()
        assert room is not None and len(room) == len(encoded) - at
        part = encoded[at : at + 50_000]
        room[: len(part)] = part
        reader.received(len(part))
        at += len(part)
    assert fields(one) == (LONG, 1, frames.REQUEST, 0, long) and isinstance(one.data, bytearray)
    assert reader.room() is None
    assert read(CHECK) == [fields(found) for found in _fed(reader, CHECK)]


def _fed(reader: FrameReader, data: bytes) -> list[Frame]:
    reader.feed(data)
    return [one for one in iter(reader.next, None) if one is not None]


@pytest.mark.parametrize("length", [MAX_DATA + 1, 1 << 24, (1 << 32) - 1])
def test_a_frame_that_is_too_long_is_reported_and_never_kept(length: int) -> None:
    reader = FrameReader()
    reader.feed(length.to_bytes(4, "big") + bytes.fromhex("00000001 01 00") + b"xyz")
    one = reader.next()
    assert one is not None and fields(one) == (length, 1, frames.REQUEST, 0, None)
    rest = length - 3
    block = bytes(1 << 20)
    while rest and length < 1 << 25:
        reader.feed(block[: min(rest, len(block))])
        rest -= min(rest, len(block))
        assert reader.next() is None
        assert not reader._input
    if not rest:
        reader.feed(CHECK)
        assert (one := reader.next()) is not None and one.data == CHECK[HEADER_SIZE:]


def test_the_longest_frame_is_taken() -> None:
    data = bytes(MAX_DATA)
    ((length, *_, body),) = read(frames.frame(1, frames.REQUEST, data))
    assert (length, body) == (MAX_DATA, data)
