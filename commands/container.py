"""List, measure, signal, pause and remove containers."""

from __future__ import annotations

import contextlib

from caisson.agent.client import listing
from caisson.agent.client.connection import Agent, call_sync, run_sync
from caisson.agent.client.errors import AgentError, explain_container_errors
from caisson.agent.client.registry import container_registry
from caisson.commands.running import running_vm
from caisson.commands.streams import print_table
from caisson.image.vm import RunningVM, VMError


def ps(*, container: str, everything: bool, name: str, as_json: bool) -> None:
    """List the processes of containers."""
    with running_vm(name) as vm, explain_container_errors(container):
        found = call_sync(vm, lambda agent: listing.processes(agent, container_registry(vm), container))
    shown = [one for one in found if one["processes"] or everything or container]
    rows = (
        {"container": one["container"], "status": one["status"]} | row
        for one in shown
        for row in one["processes"] or [{"command": f"exited with status {one['exit_status']}"}]
    )
    print_table(("container", "status", *listing.COLUMNS), shown, rows, as_json=as_json)


def start(*, container: str, name: str) -> None:
    """Restart an exited container; prints its name."""
    from caisson.agent.client import logs as container_logs  # late, as below: other commands do not need it

    with running_vm(name) as vm, explain_container_errors(container):
        call_sync(vm, lambda agent: container_logs.restart(agent, agent.container(container)))
    print(container)


def stats(*, container: str, name: str, interval: float, as_json: bool) -> None:
    """Show the resource usage of containers."""
    with running_vm(name) as vm, explain_container_errors(container):
        found = run_sync(vm, lambda agent: listing.stats(agent, container_registry(vm), container, interval))
    shown = (one | {name: _mebibytes(one[name]) for name in ("memory", "memory_limit")} for one in found)
    print_table(listing.USAGE, found, shown, as_json=as_json)


def _mebibytes(size: int | None) -> str | None:
    return None if size is None else f"{size / (1 << 20):.1f} MiB"


def kill(*, container: str, signal: str, everything: bool, name: str) -> None:
    """Send a signal to a container."""
    number = listing.signal_number(signal)

    async def work(agent: Agent) -> None:
        await listing.signal_container(agent.container(container), number, everything=everything)

    with running_vm(name) as vm, explain_container_errors(container):
        call_sync(vm, work)


def pause(*, container: str, name: str) -> None:
    """Freeze all processes of a container."""
    with running_vm(name) as vm, explain_container_errors(container):
        call_sync(vm, lambda agent: agent.container(container).pause())


def resume(*, container: str, name: str) -> None:
    """Thaw a container."""
    with running_vm(name) as vm, explain_container_errors(container):
        call_sync(vm, lambda agent: agent.container(container).resume())


def rm(*, container: str, timeout: int, name: str) -> None:
    """Kill a container and remove it."""
    with running_vm(name) as vm, explain_container_errors(container):
        remove_container(vm, container, timeout)
        release_disk(vm, container)


def wait(*, container: str, name: str) -> None:
    """Wait until a container exits; prints its exit status."""
    with running_vm(name) as vm, explain_container_errors(container):
        status = call_sync(vm, lambda agent: agent.container(container).init().wait())
    print(status)


def attach(*, container: str, name: str) -> int:
    """Attach to a detached container; returns its exit status, 0 after detaching."""
    from caisson.agent.client import logs as container_logs

    with running_vm(name) as vm, explain_container_errors(container):
        terminal = bool(container_registry(vm).metadata(container).get("terminal"))

        async def work(agent: Agent) -> int | None:
            return await container_logs.attach_detached(agent, agent.container(container), terminal=terminal)

        return run_sync(vm, work) or 0


def remove_orphaned(vm: RunningVM) -> None:
    """Remove the containers whose `run` was killed."""
    for container in container_registry(vm).orphaned():
        with contextlib.suppress(AgentError):  # it may not have been created
            remove_container(vm, container, timeout=30)
        release_disk(vm, container)


def remove_container(vm: RunningVM, container: str, timeout: int) -> None:
    """Kill a container and remove it.  Raises AgentError."""
    call_sync(vm, lambda agent: agent.container(container).remove(timeout))


def release_disk(vm: RunningVM, container: str) -> None:
    """Unregister a removed container, and unplug disks that no other container uses."""
    from caisson.image.vm.hotplug.disks import unplug_unused

    registry = container_registry(vm)
    registry.discard(container)
    with contextlib.suppress(VMError):  # they disappear with the VM
        unplug_unused(vm, lambda: {str(registry.metadata(other).get("disk")) for other in registry.names()})
