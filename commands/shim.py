"""`containerd-shim-caisson-v2`: containerd's runtime shim over our VMs.

The first lines delay every `docker run`: the server is imported after containerd has its response.
"""

from __future__ import annotations

import os
import sys

from caisson.agent.shim.launch import RUNTIME_OPTIONS, Arguments, start

#: containerd's type name of an OCI features document (containerd, core/runtime/typeurl.go).
FEATURES_URL = "types.containerd.io/opencontainers/runtime-spec/1/features/Features"

#: Mounts that containerd 2.2 and later leaves to a shim which names them here: with roots as disks, image files are
#: wanted as they are (containerd, core/runtime/v2/task_mounts_deprecated.go).
ALLOW_MOUNTS = "containerd.io/runtime-allow-mounts"
IMAGE_MOUNTS = "erofs,format/*,mkdir/*"

#: OpenSSL costs a shim 5 MiB for nothing: asyncio and hashlib work without it.
OPENSSL = ("ssl", "_hashlib")

#: Modules that are imported but never used if protobuf has its C library.
DEFERRED = ("google.protobuf.internal.python_message",)

TYPE_CHECKING = False
if TYPE_CHECKING:
    import socket
    from typing import Protocol

    from caisson.agent.pods.machines import Machines
    from caisson.agent.shim.options import RuntimeOptions
    from caisson.image.vm.launch import SupervisorProcess

    class MachineSource(Protocol):
        """A source of VMs."""

        def prepare(self) -> None:
            """Start the first VM's processes while this process is still importing."""

        def machines(self, options: RuntimeOptions | None) -> Machines:
            """Return the source of VMs configured by the runtime's options."""

        def block_roots(self) -> bool:
            """Return whether VMs get root file systems as disks, unless a runtime's options differ."""


class PodVMs:
    """VMs of QEMU."""

    def __init__(self) -> None:
        self._supervisor: SupervisorProcess | None = None

    def prepare(self) -> None:
        from caisson.image.vm.launch import SupervisorProcess

        self._supervisor = SupervisorProcess()

    def machines(self, options: RuntimeOptions | None) -> Machines:
        from caisson.commands.pods import Pods

        if options is None:
            return Pods(supervisor=self._supervisor)
        return Pods.from_config(options.path, options.body, self._supervisor)

    def block_roots(self) -> bool:
        from caisson.agent.pods.machines import MachineError
        from caisson.commands import pods

        try:
            return pods.Pods(configuration=pods.CONFIGURATION).block_roots
        except MachineError:  # `start` will report it
            return False


def main(source: MachineSource | None = None) -> int:
    """Execute containerd's command.  Returns the exit status; errors go to stderr in one line."""
    source = source or PodVMs()
    try:
        arguments = Arguments(sys.argv[1:])
        if arguments.version:
            from caisson.proto.contract import VERSION

            print(f"containerd-shim-caisson-v2 {VERSION}")
        elif arguments.info:
            _print_info(source)
        elif arguments.action == "start":
            start(arguments, lambda listener, options, given: _serve(listener, options, given, source))
        elif arguments.action == "delete":
            _delete(arguments, source)
        else:
            raise ValueError("usage: containerd-shim-caisson-v2 -namespace NS -address SOCKET -id ID start|delete")
    except (OSError, ValueError) as error:
        print(f"containerd-shim-caisson-v2: {error}", file=sys.stderr)
        return 1
    return 0


def run_and_exit(source: MachineSource | None = None) -> None:
    """Execute containerd's command and exit at once: containerd waits, and to take down the interpreter takes 5 ms."""
    status = main(source)
    sys.stdout.flush()
    os._exit(status)


def _serve(listener: socket.socket, options: bytes, arguments: Arguments, source: MachineSource) -> None:
    source.prepare()
    if "hashlib" not in sys.modules:  # Python's own hashes were only for `start`
        sys.modules.update(dict.fromkeys(OPENSSL))  # type: ignore[arg-type]

    from caisson.agent.base.lazyimport import LazyImporter

    sys.meta_path.insert(0, LazyImporter(DEFERRED))

    machines = source.machines(_parse(options, arguments.id))

    from caisson.agent.shim.host import begin_early

    begun = begin_early(arguments.id, arguments.namespace, machines)

    from caisson.agent.shim.server import serve

    serve(listener, arguments, machines, begun)


def _parse(options: bytes, container_id: str) -> RuntimeOptions | None:
    if RUNTIME_OPTIONS.encode() not in options:
        return None
    from caisson.agent.shim.options import RuntimeOptions  # late: protobuf

    return RuntimeOptions.parse(options, container_id)


def _delete(arguments: Arguments, source: MachineSource) -> None:
    from caisson.agent.shim.bundle import TaskBundle
    from caisson.agent.shim.delete import delete

    bundle = TaskBundle(arguments.bundle or ".", arguments.id)
    sys.stdout.buffer.write(delete(bundle, lambda: source.machines(None)))


def _print_info(source: MachineSource) -> None:
    import json

    from caisson.agent.runtime.features import document_of_guest
    from caisson.proto.containerd import types_pb2
    from caisson.proto.contract import VERSION

    info = types_pb2.RuntimeInfo(name="io.containerd.caisson.v2")
    info.version.version = VERSION
    if source.block_roots():
        info.annotations[ALLOW_MOUNTS] = IMAGE_MOUNTS
    info.features.type_url = FEATURES_URL
    info.features.value = json.dumps(document_of_guest()).encode()
    sys.stdout.buffer.write(info.SerializeToString())


if __name__ == "__main__":
    run_and_exit()
