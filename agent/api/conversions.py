"""Conversions between messages of both generations and the model's types: OCI messages → OCI JSON, records of
statistics → messages.

Specs from the wire and from a config.json go through one parser.

The two differ in spelling (UIDMappings, uidMappings), and the wire cannot express "not given": zero means that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Container
    from typing import Any

    from google.protobuf.descriptor import FieldDescriptor
    from google.protobuf.message import Message

#: Fields in which zero is a value: device number 0 is not any device.
ZERO_COUNTS = {"grpc.LinuxDeviceCgroup": ("Major", "Minor"), "grpc.LinuxIDMapping": ("HostID", "ContainerID")}

#: Names on the wire whose words are not separated by capitals.
SPELLED = {"Pagesize": "pageSize", "errnoret": "errnoRet", "Version": "ociVersion"}


def spec_to_json(spec: Message) -> dict[str, Any]:
    """Return a grpc.Spec as a config.json document."""
    document = _to_json(spec)
    _correct_devices(document.get("linux", {}).get("resources", {}))
    return document


def resources_to_json(resources: Message) -> dict[str, Any]:
    """Return a grpc.LinuxResources as the object `linux.resources`."""
    document = _to_json(resources)
    _correct_devices(document)
    return document


def _correct_devices(resources: dict[str, Any]) -> None:
    for rule in resources.get("devices", []):
        if rule.get("type", "a") == "a":  # "all" has no numbers, and the wire sends zeros
            rule.pop("major", None)
            rule.pop("minor", None)


def exec_to_json(process: Message, fields: Container[str]) -> dict[str, Any]:
    """Return those ``fields`` of a grpc.Process, which is to join a container, as an OCI process document.

    All others are those of the container's init process.
    """
    return {name: value for name, value in _to_json(process).items() if name in fields}


def json_name(name: str) -> str:
    """Return a field's name in config.json: ConsoleSize → consoleSize, UIDMappings → uidMappings, CPU → cpu."""
    if name in SPELLED:
        return SPELLED[name]
    return re.sub(r"^[A-Z]+?(?=[A-Z][a-z]|[^A-Z]|$)", lambda head: head[0].lower(), name)


def _to_json(message: Message) -> dict[str, Any]:
    document: dict[str, Any] = {}
    for field, value in message.ListFields():
        document[json_name(field.name)] = _value(field, value)
    for name in ZERO_COUNTS.get(message.DESCRIPTOR.full_name, ()):
        document.setdefault(json_name(name), 0)
    return document


def _value(field: FieldDescriptor, value: Any) -> Any:
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    if isinstance(value, Mapping):  # its entries' options also say so, but would import descriptor_pb2
        return dict(value)
    return [_to_json(element) for element in value] if field.is_repeated else _to_json(value)


def fill(message: Message, record: Record) -> None:
    """Set the fields of a message from a record's, nested ones and maps included."""
    for name, value in vars(record).items():
        field: Any = getattr(message, name)
        if isinstance(value, Record):
            field.SetInParent()
            fill(field, value)
        elif isinstance(value, tuple):
            for item in value:
                if isinstance(item, Record):
                    fill(field.add(), item)
                else:
                    field.append(item)
        elif isinstance(value, (int, str)):
            setattr(message, name, value)
        else:
            for key, item in value.items():
                if isinstance(item, Record):
                    fill(field[key], item)
                else:
                    field[key] = item
