"""config.json of an OCI bundle → the specification that goes to an agent.

What the wire has no field for, and what means something on the host alone, is refused by its name.
"""

from __future__ import annotations

from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from caisson.agent.client.errors import Mistake
from caisson.proto.kata1 import oci_pb2

#: The one name that is another on the wire; the others differ in capital letters at most, of which Go takes any.
RENAMED = {"ociversion": "version"}


def spec_from_bundle(document: dict[str, Any]) -> oci_pb2.Spec:
    """The specification of a bundle.  Processes, network, cgroup and root are the guest's.  Raises Mistake."""
    spec = oci_pb2.Spec()
    _fill(spec, document, "")
    if not spec.Process.Args:
        raise Mistake("config.json: process.args: says nothing to run")
    for number, mount in enumerate(spec.Mounts):
        if mount.type == "bind" or {"bind", "rbind"} & set(mount.options):
            raise Mistake(f"config.json: mounts[{number}]: {mount.source} is of the host, and not in the guest")
    kept = [one for one in spec.Linux.Namespaces if one.Type not in ("pid", "network")]
    del spec.Linux.Namespaces[:]
    spec.Linux.Namespaces.extend(kept)
    spec.Linux.CgroupsPath = ""
    return spec


def _fill(message: Any, document: Any, where: str) -> None:
    if not isinstance(document, dict):
        raise Mistake(f"config.json: {where or 'it'} is to be an object")
    fields = {str(field.name).lower(): field for field in message.DESCRIPTOR.fields}
    for name, value in document.items():
        field = fields.get(RENAMED.get(name.lower(), name.lower()))
        place = f"{where}.{name}" if where else name
        if field is None:
            raise Mistake(f"config.json: {place}: cannot be said to a guest")
        if value is not None:
            _set(message, field, value, place)


def _set(message: Any, field: FieldDescriptor, value: Any, place: str) -> None:
    target = getattr(message, field.name)
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if field.is_repeated and not isinstance(value, dict if is_map else list):
        raise Mistake(f"config.json: {place} is to be {'an object' if is_map else 'a list'}")
    try:
        if field.message_type is None:
            if field.is_repeated:
                target.extend(value)
            else:
                setattr(message, field.name, value)
        elif is_map:
            for key, one in value.items():
                target[key] = one
        elif field.is_repeated:
            for number, one in enumerate(value):
                _fill(target.add(), one, f"{place}[{number}]")
        else:
            target.SetInParent()
            _fill(target, value, place)
    except (TypeError, ValueError, AttributeError) as error:
        raise Mistake(f"config.json: {place}: {error}") from None
