"""List, measure, signal, pause and remove containers."""

from __future__ import annotations

from caisson.agent.client import listing
from caisson.agent.client import logs as container_logs
from caisson.agent.client.connection import Agent
from caisson.agent.client.errors import explain_container_errors
from caisson.agent.client.guest import call_sync, container_registry
from caisson.commands.machines import running_vm
from caisson.commands.program import release_disk, remove_container


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
    listing.show(("container", "status", *listing.COLUMNS), shown, rows, as_json=as_json)


def start(*, container: str, name: str) -> None:
    """Restart an exited container; prints its name."""
    with running_vm(name) as vm, explain_container_errors(container):
        call_sync(vm, lambda agent: container_logs.restart(agent, agent.container(container)))
    print(container)


def stats(*, container: str, name: str, interval: float, as_json: bool) -> None:
    """Show the resource usage of containers."""
    with running_vm(name) as vm, explain_container_errors(container):
        found = call_sync(vm, lambda agent: listing.stats(agent, container_registry(vm), container, interval))
    shown = (one | {name: _mebibytes(one[name]) for name in ("memory", "memory_limit")} for one in found)
    listing.show(listing.USAGE, found, shown, as_json=as_json)


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
    with running_vm(name) as vm, explain_container_errors(container):
        terminal = bool(container_registry(vm).metadata(container).get("terminal"))

        async def work(agent: Agent) -> int | None:
            return await container_logs.attach_detached(agent, agent.container(container), terminal=terminal)

        return call_sync(vm, work) or 0
