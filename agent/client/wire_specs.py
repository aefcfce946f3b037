"""Convert config.json documents to what Kata's hosts send: grpc.Spec of either API generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from google.protobuf.descriptor import FieldDescriptor

from caisson.agent.client.errors import UsageError
from caisson.proto.kata1 import oci_pb2
from caisson.proto.kata3 import oci_pb2 as kata3

#: Fields renamed on the wire; the others differ only in case, which Go's decoder ignores.
RENAMED = {"ociversion": "version"}


def to_wire(document: Mapping[str, Any]) -> oci_pb2.Spec:
    """Return a spec in Kata 1.x wire format.  Raises UsageError for a field that the wire lacks."""
    spec = oci_pb2.Spec()
    _fill(spec, document, "")
    return spec


def _fill(message: Any, document: Any, where: str) -> None:
    if not isinstance(document, dict):
        raise UsageError(f"config.json: {where or 'document'} must be an object")
    fields = {str(field.name).lower(): field for field in message.DESCRIPTOR.fields}
    for name, value in document.items():
        field = fields.get(RENAMED.get(name.lower(), name.lower()))
        place = f"{where}.{name}" if where else name
        if field is None:
            raise UsageError(f"config.json: {place}: not supported in a guest")
        if value is not None:
            _set(message, field, value, place)


def _set(message: Any, field: FieldDescriptor, value: Any, place: str) -> None:
    target = getattr(message, field.name)
    is_map = field.message_type is not None and field.message_type.GetOptions().map_entry
    if field.is_repeated and not isinstance(value, dict if is_map else list):
        raise UsageError(f"config.json: {place} must be {'an object' if is_map else 'a list'}")
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
        raise UsageError(f"config.json: {place}: {error}") from None


def to_kata3(spec: oci_pb2.Spec) -> kata3.Spec:
    """Convert a Kata 1.x spec to 3.x: the same bytes except for the seccomp filter, whose fields have moved."""
    rest = oci_pb2.Spec()
    rest.CopyFrom(spec)
    if spec.HasField("Linux"):
        rest.Linux.ClearField("Seccomp")
    found = kata3.Spec.FromString(rest.SerializeToString())
    if spec.HasField("Linux") and spec.Linux.HasField("Seccomp"):
        old, new = spec.Linux.Seccomp, found.Linux.Seccomp
        new.DefaultAction = old.DefaultAction
        new.Architectures.extend(old.Architectures)
        for one in old.Syscalls:
            call = new.Syscalls.add(Names=one.Names, Action=one.Action)
            for argument in one.Args:
                call.Args.add().ParseFromString(argument.SerializeToString())
    return found
