"""`containerd-shim-caisson-v2`: containerd's runtime shim over our VMs.

The first lines are on the way of every `docker run`: what serves is imported after containerd has its answer.
"""

from __future__ import annotations

import sys

from caisson.agent.shim.launch import Arguments, start

#: How containerd names an OCI features document (containerd, core/runtime/typeurl.go).
FEATURES_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from collections.abc import Callable

    from caisson.agent.pods.machines import Machines
    from caisson.agent.shim.options import RuntimeOptions

    #: Where VMs come from, given the runtime's options.
    MakeMachines = Callable[[RuntimeOptions | None], Machines]


def _pods(options: RuntimeOptions | None) -> Machines:
    from caisson.commands.pods import Pods

    return Pods() if options is None else Pods.configured(options.path, options.body)


def main(make_machines: MakeMachines = _pods) -> int:
    """Do what containerd asks for.  Returns the exit status; what is wrong goes to stderr, in one line."""
    try:
        arguments = Arguments(sys.argv[1:])
        if arguments.version:
            from caisson.proto.contract import VERSION

            print(f"containerd-shim-caisson-v2 {VERSION}")
        elif arguments.info:
            _print_info()
        elif arguments.action == "start":
            start(arguments, lambda listener, options, given: _serve(listener, options, given, make_machines))
        elif arguments.action == "delete":
            _delete(arguments, make_machines)
        else:
            raise ValueError("usage: containerd-shim-caisson-v2 -namespace NS -address SOCKET -id ID start|delete")
    except (OSError, ValueError) as error:
        print(f"containerd-shim-caisson-v2: {error}", file=sys.stderr)
        return 1
    return 0


def _serve(
    listener: socket.socket,
    options: bytes,
    arguments: Arguments,
    make_machines: MakeMachines,
) -> None:
    from caisson.agent.shim.options import RuntimeOptions
    from caisson.agent.shim.server import serve

    serve(listener, arguments, make_machines(RuntimeOptions.parse(options, arguments.id)))


def _delete(arguments: Arguments, make_machines: MakeMachines) -> None:
    from caisson.agent.shim.bundle import TaskBundle
    from caisson.agent.shim.delete import delete

    sys.stdout.buffer.write(delete(TaskBundle(arguments.bundle or ".", arguments.id), lambda: make_machines(None)))


def _print_info() -> None:
    import json

    from caisson.agent.runtime.features import document_of_guest
    from caisson.proto.containerd import types_pb2
    from caisson.proto.contract import VERSION

    info = types_pb2.RuntimeInfo(name="io.containerd.caisson.v2")
    info.version.version = VERSION
    info.features.type_url = FEATURES_URL
    info.features.value = json.dumps(document_of_guest()).encode()
    sys.stdout.buffer.write(info.SerializeToString())


if __name__ == "__main__":
    sys.exit(main())
