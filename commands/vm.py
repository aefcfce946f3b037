"""List, watch and stop virtual machines."""

from __future__ import annotations

import contextlib
import signal
import time

from caisson.agent.client.errors import AgentError, UsageError, explain_container_errors
from caisson.agent.client.registry import active_forwards
from caisson.commands.running import running_vm
from caisson.commands.streams import console_writer, info, print_table
from caisson.image.vm.errors import VMError
from caisson.image.vm.hotplug.resources import memory_of_all, set_memory
from caisson.image.vm.running import find_vm, get_vm, list_vms, vms_by_version


def stop_vm(*, name: str, everything: bool) -> None:
    """Stop a VM: its containers, then the machine."""
    from caisson.agent.client.connection import call_sync  # late: listing VMs needs no agent

    found = None if everything else find_vm(name)
    if not found and not everything:
        names = ", ".join(vm.name for vm in list_vms()) or "none"
        raise VMError(f"VM {name!r}: is not running; running: {names}")
    vms, others = vms_by_version() if everything else ([found] if found else [], {})
    for vm in vms:
        with contextlib.suppress(AgentError):
            call_sync(vm, lambda agent: agent.destroy_sandbox(timeout=5.0))
        vm.stop()
        info(f"{vm.name}: stopped")
    for other in others:
        find_vm(other)  # its error says how to stop it


def list_running(*, as_json: bool) -> None:
    """List the running VMs."""
    vms, others = vms_by_version()
    memory = memory_of_all(vms)
    infos = [vm.info | {"memory_now": memory[vm.name], "ports": active_forwards(vm)} for vm in vms]
    shown = (
        document
        | {"uptime": f"{time.time() - document['started']:.0f} s"}
        | {"memory": f"{document['memory_now'] or document['memory']} MiB"}
        | {"ports": ", ".join(document["ports"]) or None}
        for document in infos
    )
    foreign = [{"name": name, "state": f"of Caisson {version}"} for name, version in others.items()]
    columns = ("name", "state", "accel", "vsock", "cpus", "memory", "uptime", "ports")
    print_table(columns, [*infos, *foreign], [*shown, *foreign], as_json=as_json)


def logs(*, container: str, only_agent: bool, follow: bool, since: str, tail: int | None, name: str) -> None:
    """Show the output of a detached container or a guest."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # exit as cat(1) does when the reader is gone
    if container:
        from caisson.agent.client import logs as container_logs
        from caisson.agent.client.connection import run_sync

        moment = container_logs.parse_time(since) if since else 0.0
        with running_vm(name) as vm, explain_container_errors(container):
            run_sync(vm, lambda agent: container_logs.show(agent, container, follow=follow, since=moment, tail=tail))
        return
    if since or tail is not None:
        raise UsageError("--since, --tail: are for a container's output; name a container")
    from caisson.agent.client.diagnostics import AgentLines

    write_console = console_writer()
    get_vm(name).show(AgentLines(write_console) if only_agent else write_console, follow=follow)


def balloon(*, size: int, name: str) -> None:
    """Set the memory that a guest keeps; prints the MiB that it then has."""
    from caisson.agent.client.connection import call_sync

    with running_vm(name) as vm:
        call_sync(vm, lambda agent: agent.load_module("virtio_balloon"))
        kept = set_memory(vm, size)
    print(kept)
