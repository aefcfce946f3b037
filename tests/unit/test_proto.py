"""The compiled protocol against the table of what Kata 1.x hosts send and expect."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from caisson.proto.kata1 import agent_pb2, health_pb2, oci_pb2, types_pb2

TABLE = Path(__file__).with_name("wire-1.x.txt")
FILES = [oci_pb2.DESCRIPTOR, types_pb2.DESCRIPTOR, agent_pb2.DESCRIPTOR, health_pb2.DESCRIPTOR]
SCALARS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}


def type_name(field: Any) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{type_name(key)},{type_name(value)}>"
    if field.message_type is not None:
        return str(field.message_type.full_name)
    return str(field.enum_type.full_name) if field.enum_type is not None else SCALARS[field.type]


def lines_of(message: Any) -> Iterator[str]:
    if message.GetOptions().map_entry:
        return
    if not message.fields:
        yield message.full_name
    for field in message.fields:
        kind = type_name(field)
        repeated = "R " if field.is_repeated and not kind.startswith("map<") else ""
        yield f"{message.full_name} {field.name} {field.number} {repeated}{kind}"
    for enum in message.enum_types:
        yield from lines_of_enum(enum)


def lines_of_enum(enum: Any) -> Iterator[str]:
    yield f"{enum.full_name} " + " ".join(f"{value.name}={value.number}" for value in enum.values)


def compiled() -> Iterator[str]:
    for file in FILES:
        for message in file.message_types_by_name.values():
            yield from lines_of(message)
        for enum in file.enum_types_by_name.values():
            yield from lines_of_enum(enum)
        for service in file.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name} {method.input_type.full_name} {method.output_type.full_name}"


def test_every_message_method_and_enum_is_wire_compatible() -> None:
    wanted = {line for line in TABLE.read_text().splitlines() if not line.startswith("#")}
    assert set(compiled()) == wanted
