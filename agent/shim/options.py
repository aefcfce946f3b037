"""The runtime's options, from containerd's configuration (`ConfigPath`) or docker's daemon.json.

They come on the standard input of `start`: an Any, or since containerd 2.3 an extension of BootstrapParams; and again
with Create, where runc's options are read, which clients send to any runtime.
"""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from caisson.agent.rpc.codes import StatusCode
from caisson.agent.shim.errors import ShimError
from caisson.agent.shim.launch import RUNTIME_OPTIONS
from caisson.proto.containerd import bootstrap_pb2, linux_runc_options_pb2, options_pb2, runc_options_pb2
from caisson.proto.record import Record

#: runc's options by their names: those of its shim, and those that clients of containerd 1.x write for other shims.
RUNC_OPTIONS = {
    message.DESCRIPTOR.full_name: message
    for message in (runc_options_pb2.Options, linux_runc_options_pb2.CreateOptions)
}


def shim_cgroup(options: Any) -> str:
    """Return the cgroup for the shim's own process from runc's options; empty for none.

    Raises ShimError if they name another program than runc, as no host program runs containers here.
    """
    name = options.type_url.rpartition("/")[2]
    if name not in RUNC_OPTIONS:
        return ""
    try:
        given = RUNC_OPTIONS[name].FromString(options.value)
    except DecodeError as error:
        raise ShimError(StatusCode.INVALID_ARGUMENT, f"{name}: {error}") from error
    program = getattr(given, "binary_name", "")
    if program not in ("", "runc"):
        text = f"{name}: binary_name: {program} cannot run a container in a VM; leave it out"
        raise ShimError(StatusCode.INVALID_ARGUMENT, text)
    return str(given.shim_cgroup)


class RuntimeOptions(Record):
    """A configuration instead of /etc/caisson/shim.toml: a file's path, or its text."""

    path: str
    body: str

    @classmethod
    def parse(cls, message: bytes, container_id: str) -> RuntimeOptions | None:
        """Parse the options sent by containerd; None if there are none, or they are another runtime's."""
        for one in _candidates(message, container_id):
            if one.type_url.rpartition("/")[2] == RUNTIME_OPTIONS:
                options = options_pb2.Options.FromString(one.value)
                if options.config_path or options.config_body:
                    return cls(options.config_path, options.config_body.decode(errors="replace"))
        return None


def _candidates(message: bytes, container_id: str) -> list[Any]:
    try:
        parameters = bootstrap_pb2.BootstrapParams.FromString(message)
        if parameters.instance_id == container_id:
            return [extension.value for extension in parameters.extensions]
    except DecodeError:
        pass  # an Any, whose value is no text
    try:
        return [Any.FromString(message)]
    except DecodeError:
        return []
