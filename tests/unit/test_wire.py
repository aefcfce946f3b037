"""Test encoding and decoding messages without protobuf, against protobuf itself; and bytes that nobody sends."""

from __future__ import annotations

import random
from typing import Any

import pytest
from google.protobuf.message import DecodeError

from caisson.agent.api.kata3.service import WriteStreamRequest
from caisson.agent.client import execute, readiness
from caisson.agent.rpc import wire
from caisson.proto.caisson import caisson_pb2
from caisson.proto.kata3 import agent_pb2, health_pb2
from caisson.proto.ttrpc import ttrpc_pb2

KEY = {"container_id": "box", "exec_id": "42"}
NUMBERS = (0, 1, 127, 128, 300, (1 << 32) - 1)


@pytest.mark.parametrize("number", NUMBERS)
def test_a_message_is_encoded_as_by_protobuf(number: int) -> None:
    fields: list[tuple[int, int | str | bytes]] = [(1, "bö"), (2, ""), (3, number), (4, number)]
    message = agent_pb2.TtyWinResizeRequest(container_id="bö", row=number, column=number)
    assert wire.encode(fields) == message.SerializeToString()
    data = bytes(number & 0xFFFF)
    assert (
        wire.encode([(1, "box"), (3, data)])
        == agent_pb2.WriteStreamRequest(container_id="box", data=data).SerializeToString()
    )


@pytest.mark.parametrize(
    ("message", "fields"),
    [
        (agent_pb2.WaitProcessResponse(status=137), [(1, 137)]),
        (agent_pb2.ReadStreamResponse(data=b"\0" * 300), [(1, bytes(300))]),
        (ttrpc_pb2.Status(code=-1), [(1, (1 << 64) - 1)]),
        (caisson_pb2.ErrorDetails(reason=caisson_pb2.PROGRAM_NOT_FOUND, text="ü"), [(1, 5), (2, "ü".encode())]),
        (agent_pb2.WaitProcessResponse(), []),
    ],
)
def test_a_message_of_protobufs_is_decoded(message: Any, fields: list[tuple[int, int | bytes]]) -> None:
    assert wire.decode(message.SerializeToString()) == fields


def test_the_last_value_counts_and_unknown_fields_do_not() -> None:
    assert wire.value_of(b"\x08\x01\x18\x07\x21" + bytes(8) + b"\x2d" + bytes(4) + b"\x08\x02", 1) == 2
    assert wire.value_of(b"\x08\x01", 2) is None


@pytest.mark.parametrize("broken", [b"\x08", b"\x0a\x05abc", b"\x0b", b"\x08" + b"\xff" * 11, b"\x21\0", b"\x80"])
def test_broken_messages_are_refused(broken: bytes) -> None:
    with pytest.raises(wire.WireError):
        wire.decode(broken)


def test_the_number_of_fields_is_bounded() -> None:
    assert len(wire.decode(b"\x08\x01" * wire.MAX_FIELDS)) == wire.MAX_FIELDS
    with pytest.raises(wire.WireError, match="more than"):
        wire.decode(b"\x08\x01" * (wire.MAX_FIELDS + 1))


def test_random_bytes_are_decoded_or_refused() -> None:
    rng = random.Random(5)
    for _ in range(5000):
        data = rng.randbytes(rng.randrange(40))
        try:
            fields = wire.decode(data)
        except wire.WireError:
            continue
        assert all(isinstance(value, int) or len(value) <= len(data) for _, value in fields)


def test_views_are_of_the_message_itself() -> None:
    message = bytearray(wire.encode([(1, "c"), (2, "e"), (3, b"data")]))
    found = wire.views(memoryview(message), 3)
    assert found is not None and [bytes(one) for one in found] == [b"c", b"e", b"data"]
    message[-1:] = b"e"
    assert bytes(found[2]) == b"date"


@pytest.mark.parametrize(
    "fields",
    [
        [(1, "c"), (2, "e")],
        [(1, "c"), (3, b"data"), (2, "e")],
        [(1, "c"), (2, 7), (3, b"data")],
        [(1, "c"), (2, "e"), (3, b"data"), (3, b"more")],
        [(1, "c"), (2, "e"), (3, b"data"), (4, 1)],
    ],
)
def test_an_unusual_message_has_no_views(fields: list[tuple[int, int | str | bytes]]) -> None:
    assert wire.views(memoryview(wire.encode(fields)), 3) is None
    assert wire.views(memoryview(wire.encode(fields) + b"\x1a\x05"), 3) is None


@pytest.mark.parametrize(
    "encoded",
    [
        wire.encode([(1, "c"), (2, "e"), (3, b"data")]),
        wire.encode([(1, "c"), (2, "e"), (3, b"data"), (3, b"more"), (9, 1)]),
        wire.encode([(2, "e"), (1, "c")]),
        b"",
        wire.encode([(1, b"\xff"), (2, "e"), (3, b"data")]),
        wire.encode([(1, "c"), (2, "e"), (3, b"data")])[:-1],
    ],
)
def test_a_long_write_to_standard_input_is_what_protobuf_makes_of_it(encoded: bytes) -> None:
    request = WriteStreamRequest()
    try:
        expected = agent_pb2.WriteStreamRequest.FromString(encoded)
    except DecodeError:
        with pytest.raises(DecodeError):
            request.ParseFromString(memoryview(encoded))
        return
    request.ParseFromString(memoryview(encoded))
    found = request.container_id, request.exec_id, bytes(request.data)
    assert found == (expected.container_id, expected.exec_id, expected.data)


def test_a_command_knows_its_fields_by_the_numbers_of_the_schema() -> None:
    key = ((1, "box"), (2, "42"))
    pairs: list[tuple[Any, list[tuple[int, int | bytes]]]] = [
        (caisson_pb2.ExecProcessRequest(process=b"p", **KEY), [(execute.PROCESS, b"p")]),
        (agent_pb2.WriteStreamRequest(data=b"d", **KEY), [(execute.DATA, b"d")]),
        (agent_pb2.ReadStreamRequest(len=7, **KEY), [(execute.LENGTH, 7)]),
        (agent_pb2.SignalProcessRequest(signal=9, **KEY), [(execute.SIGNAL, 9)]),
        (agent_pb2.TtyWinResizeRequest(row=1, column=2, **KEY), [(execute.ROWS, 1), (execute.COLUMNS, 2)]),
        (agent_pb2.CloseStdinRequest(**KEY), []),
        (agent_pb2.WaitProcessRequest(**KEY), []),
    ]
    for message, fields in pairs:
        assert wire.encode([*key, *fields]) == message.SerializeToString()
    assert agent_pb2.ReadStreamResponse.DESCRIPTOR.fields_by_name["data"].number == execute.RESPONSE_DATA
    assert agent_pb2.WaitProcessResponse.DESCRIPTOR.fields_by_name["status"].number == execute.STATUS
    health = health_pb2.HealthCheckResponse
    assert health.DESCRIPTOR.fields_by_name["status"].number == readiness.STATUS
    assert health.SERVING == readiness.SERVING
    assert caisson_pb2.DESCRIPTOR.services_by_name["Guest"].full_name == execute.GUEST
    assert agent_pb2.DESCRIPTOR.services_by_name["AgentService"].full_name == execute.AGENT
