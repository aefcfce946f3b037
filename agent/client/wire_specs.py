"""Convert config.json documents to what Kata's hosts send: grpc.Spec of either API generation."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from caisson.agent.client.errors import UsageError
from caisson.proto.from_json import FieldError, fill
from caisson.proto.kata1 import oci_pb2
from caisson.proto.kata3 import oci_pb2 as kata3


def to_wire(document: Mapping[str, Any]) -> oci_pb2.Spec:
    """Return a spec in Kata 1.x wire format.  Raises UsageError for a field that the wire lacks."""
    spec = oci_pb2.Spec()
    try:
        fill(spec, document, unknown=_refuse)
    except FieldError as error:
        raise UsageError(f"config.json: {error}") from None
    return spec


def _refuse(field: str) -> None:
    raise UsageError(f"config.json: {field}: not supported in a guest")


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
