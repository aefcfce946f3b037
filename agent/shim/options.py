"""The runtime's options, as containerd's configuration (`ConfigPath`) and docker's daemon.json give them.

They come on the standard input of `start`: an Any, or since containerd 2.3 an extension of BootstrapParams; and again
with Create, which is where those of runc are read that clients send to any runtime.
"""

from __future__ import annotations

from google.protobuf.any_pb2 import Any
from google.protobuf.message import DecodeError

from caisson.agent.base.record import Record
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.shim.errors import ShimError
from caisson.proto.containerd import bootstrap_pb2, linux_runc_options_pb2, options_pb2, runc_options_pb2

TYPE_URL = options_pb2.Options.DESCRIPTOR.full_name

#: runc's options by their names: those of its shim, and those that clients of containerd 1.x write for other shims.
RUNC_OPTIONS = {
    message.DESCRIPTOR.full_name: message
    for message in (runc_options_pb2.Options, linux_runc_options_pb2.CreateOptions)
}


def shim_cgroup(options: Any) -> str:
    """Return the cgroup that runc's options want the shim's process itself to be in; empty for none.

    Raises ShimError for the name of a program in the place of runc, as none of the host's runs containers here.
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
    """A configuration in place of /etc/caisson/shim.toml: a file's path, or its text."""

    path: str
    body: str

    @classmethod
    def parse(cls, message: bytes, container_id: str) -> RuntimeOptions | None:
        """Return the options in what containerd has sent; None for none, and for those of another runtime."""
        for one in _candidates(message, container_id):
            if one.type_url.rpartition("/")[2] == TYPE_URL:
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
