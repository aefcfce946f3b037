"""oci.proto → OCI JSON, so that a spec from the wire and one from a config.json go through one parser.

The two differ in spelling (UIDMappings, uidMappings) and in that the wire cannot say "not given": a zero is that.
"""

from __future__ import annotations

import re

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Of a process that joins a container, what Kata 1.x reads; all else is as for the container's own first process.
EXEC_FIELDS = ("args", "env", "cwd", "user", "terminal")

#: Fields in which zero is a value: device number 0 is not any device.
ZERO_COUNTS = {"grpc.LinuxDeviceCgroup": ("Major", "Minor"), "grpc.LinuxIDMapping": ("HostID", "ContainerID")}


def spec_to_json(spec: Any) -> dict[str, Any]:
    """A grpc.Spec as a config.json document."""
    document = _to_json(spec)
    if "version" in document:
        document["ociVersion"] = document.pop("version")
    _correct_resources(document.get("linux", {}).get("resources", {}))
    return document


def resources_to_json(resources: Any) -> dict[str, Any]:
    """A grpc.LinuxResources as the object `linux.resources`."""
    document = _to_json(resources)
    _correct_resources(document)
    return document


def _correct_resources(resources: dict[str, Any]) -> None:
    for rule in resources.get("devices", []):
        if rule.get("type", "a") == "a":  # "all" has no numbers, and the wire sends zeros
            rule.pop("major", None)
            rule.pop("minor", None)
    for limit in resources.get("hugepageLimits", []):
        limit["pageSize"] = limit.pop("pagesize", "")


def exec_to_json(process: Any) -> dict[str, Any]:
    """A grpc.Process that is to join a container, as an OCI process document."""
    document = _to_json(process)
    return {name: document[name] for name in EXEC_FIELDS if name in document}


def json_name(name: str) -> str:
    """A field's name in config.json: ConsoleSize → consoleSize, UIDMappings → uidMappings, CPU → cpu."""
    return re.sub(r"^[A-Z]+?(?=[A-Z][a-z]|[^A-Z]|$)", lambda head: head[0].lower(), name)


def _to_json(message: Any) -> dict[str, Any]:
    document = {}
    for field, value in message.ListFields():
        document[json_name(field.name)] = _value(field, value)
    for name in ZERO_COUNTS.get(message.DESCRIPTOR.full_name, ()):
        document.setdefault(json_name(name), 0)
    return document


def _value(field: Any, value: Any) -> Any:
    if field.message_type is None:
        return list(value) if field.is_repeated else value
    if field.message_type.GetOptions().map_entry:
        return dict(value)
    return [_to_json(element) for element in value] if field.is_repeated else _to_json(value)
