"""Test the compiled protocol against tables of what Kata hosts send and expect, both generations in one process."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from google.protobuf import any_pb2, message_factory
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import Message

from caisson.proto import generate
from caisson.proto.containerd import task_v2_pb2, task_v3_pb2
from caisson.proto.kata1 import agent_pb2 as agent1
from caisson.proto.kata1 import health_pb2 as health1
from caisson.proto.kata1 import oci_pb2 as oci1
from caisson.proto.kata1 import types_pb2 as types1
from caisson.proto.kata3 import agent_pb2 as agent3
from caisson.proto.kata3 import confidential_data_hub_pb2, csi_pb2
from caisson.proto.kata3 import health_pb2 as health3
from caisson.proto.kata3 import oci_pb2 as oci3
from caisson.proto.kata3 import types_pb2 as types3

HERE = Path(__file__).parent
FILES = {
    "1.x": [oci1, types1, agent1, health1],
    "3.x": [oci3, types3, csi_pb2, agent3, health3, confidential_data_hub_pb2],
}
SCALARS = {
    FieldDescriptor.TYPE_BOOL: "bool",
    FieldDescriptor.TYPE_BYTES: "bytes",
    FieldDescriptor.TYPE_INT32: "int32",
    FieldDescriptor.TYPE_INT64: "int64",
    FieldDescriptor.TYPE_STRING: "string",
    FieldDescriptor.TYPE_UINT32: "uint32",
    FieldDescriptor.TYPE_UINT64: "uint64",
}
VALUES: dict[str, Any] = {"bool": True, "bytes": b"\xff\0", "string": "é", "int32": -2, "int64": -(1 << 40)}


def table(generation: str) -> set[str]:
    text = (HERE / f"wire-{generation}.txt").read_text()
    return {line for line in text.splitlines() if not line.startswith("#")}


def type_name(field: Any) -> str:
    if field.message_type is not None and field.message_type.GetOptions().map_entry:
        key, value = field.message_type.fields
        return f"map<{type_name(key)},{type_name(value)}>"
    if field.message_type is not None:
        return str(field.message_type.full_name)
    return str(field.enum_type.full_name) if field.enum_type is not None else SCALARS[field.type]


def label(field: Any, kind: str) -> str:
    oneof = field.containing_oneof
    if oneof is not None:
        return "O " if oneof.name.startswith("_") else f"of {oneof.name} "
    return "R " if field.is_repeated and not kind.startswith("map<") else ""


def lines_of(message: Any) -> Iterator[str]:
    if message.GetOptions().map_entry:
        return
    if not message.fields:
        yield message.full_name
    for field in message.fields:
        kind = type_name(field)
        yield f"{message.full_name} {field.name} {field.number} {label(field, kind)}{kind}"
    for enum in message.enum_types:
        yield from lines_of_enum(enum)


def lines_of_enum(enum: Any) -> Iterator[str]:
    yield f"{enum.full_name} " + " ".join(f"{value.name}={value.number}" for value in enum.values)


def compiled(generation: str) -> Iterator[str]:
    for module in FILES[generation]:
        file = module.DESCRIPTOR
        for message in file.message_types_by_name.values():
            yield from lines_of(message)
        for enum in file.enum_types_by_name.values():
            yield from lines_of_enum(enum)
        for service in file.services_by_name.values():
            for method in service.methods:
                yield f"/{service.full_name}/{method.name} {method.input_type.full_name} {method.output_type.full_name}"


@pytest.mark.parametrize("generation", FILES)
def test_every_message_method_and_enum_is_wire_compatible(generation: str) -> None:
    assert set(compiled(generation)) == table(generation)


def filled(descriptor: Descriptor, depth: int = 0) -> Message:
    """Return a message with every field set."""
    message = message_factory.GetMessageClass(descriptor)()
    for field in descriptor.fields:
        if field.message_type is not None and field.message_type.GetOptions().map_entry:
            value = field.message_type.fields_by_name["value"]
            if value.message_type is not None:
                getattr(message, field.name)["key"].CopyFrom(filled(value.message_type, depth + 1))
            else:
                getattr(message, field.name)["key"] = VALUES.get(type_name(value), 3)
        elif field.message_type is not None:
            if depth > 8:
                continue
            inner = filled(field.message_type, depth + 1)
            place = getattr(message, field.name)
            place.add().CopyFrom(inner) if field.is_repeated else place.CopyFrom(inner)
        elif field.is_repeated:
            getattr(message, field.name).append(VALUES.get(type_name(field), 3))
        else:
            setattr(message, field.name, 1 if field.enum_type is not None else VALUES.get(type_name(field), 3))
    return message


def numbers(data: bytes) -> set[int]:
    """Return the field numbers of an encoded message (protobuf.dev, Encoding)."""
    found, at = set(), 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 0x7F) << shift
            shift += 7
            if byte < 0x80:
                return value

    while at < len(data):
        key = varint()
        found.add(key >> 3)
        size = varint()
        if key & 7 == 2:
            at += size
    return found


@pytest.mark.parametrize("generation", FILES)
def test_every_field_is_encoded_under_its_number_and_decoded(generation: str) -> None:
    """Field by field, with the other generation's classes loaded, too."""
    wanted: dict[str, dict[int, str]] = {}
    for line in table(generation):
        words = line.split()
        if not line.startswith("/") and len(words) > 2 and words[2].isdecimal():
            wanted.setdefault(words[0], {})[int(words[2])] = words[1]
    seen = 0
    for module in FILES[generation]:
        for descriptor in module.DESCRIPTOR.message_types_by_name.values():
            fields = wanted.get(descriptor.full_name, {})
            message = filled(descriptor)
            data = message.SerializeToString(deterministic=True)
            assert numbers(data) == set(fields), descriptor.full_name
            again = getattr(module, descriptor.name).FromString(data)
            assert again == message
            assert {field.number: field.name for field, _ in again.ListFields()} == fields
            seen += len(fields)
    assert seen == {"1.x": 310, "3.x": 379}[generation]


def test_the_conflicting_fields_mean_what_each_generation_says() -> None:
    old = agent1.CreateContainerRequest(agent_pidns=True)
    assert not agent3.CreateContainerRequest.FromString(old.SerializeToString()).shared_mounts
    new = oci3.LinuxSeccomp(Flags=["SECCOMP_FILTER_FLAG_LOG"], Syscalls=[oci3.LinuxSyscall(Names=["read"], errnoret=0)])
    assert oci3.LinuxSeccomp.FromString(new.SerializeToString()).Syscalls[0].HasField("errnoret")
    assert not oci3.LinuxSyscall(Names=["read"]).HasField("errnoret")
    rule = oci1.LinuxSyscall(Names=["read"], Args=[oci1.LinuxSeccompArg(Index=1)])
    assert oci1.LinuxSeccomp.FromString(oci1.LinuxSeccomp(Syscalls=[rule]).SerializeToString()).Syscalls == [rule]


def test_a_service_makes_the_messages_of_its_own_generation() -> None:
    for agent in (agent1, agent3):
        service = agent.DESCRIPTOR.services_by_name["AgentService"]
        assert service.full_name == "grpc.AgentService"
        request = message_factory.GetMessageClass(service.methods_by_name["CreateContainer"].input_type)
        assert request is agent.CreateContainerRequest
        answer = message_factory.GetMessageClass(service.methods_by_name["CreateContainer"].output_type)
        assert answer().SerializeToString() == b""
    assert agent1.DESCRIPTOR.pool is not agent3.DESCRIPTOR.pool


def test_containerds_messages_take_googles_own() -> None:
    for task in (task_v2_pb2, task_v3_pb2):
        options = any_pb2.Any(type_url="runtimeoptions.v1.Options", value=b"x")
        request = task.CreateTaskRequest(id="c", options=options)
        assert task.CreateTaskRequest.FromString(request.SerializeToString()).options == options


def test_a_name_that_a_file_does_not_have_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match=r"kata3.types_pb2' has no attribute 'v7'"):
        types3.v7  # type: ignore[attr-defined]  # noqa: B018
    assert (types1.v6, types3.IPFamily.Name(1), health3.HealthCheckResponse.SERVING) == (1, "v6", 1)


def test_both_generations_work_without_protobufs_c_library() -> None:
    code = """if True:
        from google.protobuf.internal import api_implementation
        assert api_implementation.Type() == "python"
        from caisson.proto.kata1 import agent_pb2 as old, oci_pb2
        from caisson.proto.kata3 import agent_pb2 as new
        request = old.CreateContainerRequest(container_id="c", OCI=oci_pb2.Spec(Annotations={"a": "b"}))
        assert new.CreateContainerRequest.FromString(request.SerializeToString()).OCI.Annotations == {"a": "b"}
    """
    environment = {**os.environ, "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION": "python"}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_first_answer_needs_neither_the_other_generation_nor_the_whole_api() -> None:
    code = """if True:
        import sys
        import caisson.agent.api.health
        loaded = {name for name in sys.modules if name.endswith("_pb2")}
        assert loaded == {"caisson.proto.kata1.health_pb2"}, loaded
    """
    subprocess.run([sys.executable, "-c", code], check=True)


def test_generated_modules_are_up_to_date() -> None:
    generate.ensure()
    assert not generate.outdated()


def test_an_agent_has_nothing_of_the_later_generation_before_a_host_speaks_it() -> None:
    code = """if True:
        import sys
        import caisson.agent.services
        assert not [name for name in sys.modules if "kata3" in name]
        import caisson.agent.api.kata3.services
    """
    subprocess.run([sys.executable, "-c", code], check=True)
