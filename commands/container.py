"""The commands about containers that run: all that they need of a VM is its directory and its sockets.

tasks.py lends them `running` (the VM of a name, whose agent answers) and `say` (a line for the user, on stderr).
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from pathlib import Path
from typing import Protocol

from invoke import Context, Exit, task

from caisson.agent.client import console, copy, listing
from caisson.agent.client import forward as forwarding
from caisson.agent.client.connection import Agent, is_serving
from caisson.agent.client.errors import UsageError
from caisson.agent.client.foreground import execute
from caisson.agent.client.guest import Guest, Machine, active_forwards, call_sync, container_registry, forward_registry

#: An interactive shell, the better one where there are two.
SHELL = ["/bin/sh", "-c", "command -v bash >/dev/null && exec bash; exec sh"]


class RunningVM(Machine, Protocol):
    """What these commands ask of a VM: image.vm.VM has it."""

    @property
    def name(self) -> str: ...

    @property
    def vsock_socket(self) -> Path:
        """Where CONNECT <port> reaches a port of the guest."""

    @property
    def kernel_words(self) -> list[str]:
        """The kernel's command line."""

    def host_port(self, port: int) -> Path:
        """Where the guest's connections to a port of the host arrive."""

    def exit_fd(self) -> contextlib.AbstractContextManager[int | None]:
        """A descriptor that becomes readable when the VM has ended; None when it has already."""


def _vm(context: Context, name: str) -> RunningVM:
    vm: RunningVM = context.running(name)
    return vm


@task(help={"source": "a path, or CONTAINER:PATH", "target": "a path, or CONTAINER:PATH", "name": "the VM"})
def cp(context: Context, source: str, target: str, name: str = "default") -> None:
    """Copy a file or a directory into a container or out of it; it needs `sh` and `tar` in the container.

    Example: invoke cp build/app default:/tmp && invoke cp default:/etc/passwd .
    """
    for left_out in call_sync(_vm(context, name), lambda agent: copy.copy(agent, source, target)):
        context.say(f"not copied: {left_out}")


@task(
    help={
        "container": "the container; made on first use and kept",
        "guest": "outside of all containers",
        "name": "the VM",
    }
)
def shell(context: Context, container: str = "default", guest: bool = False, name: str = "default") -> None:
    """Work in a container, or with --guest in the guest itself; the exit status is the container's shell's.

    The guest's shell is there if it was booted with agent.debug_console_vport=PORT; the size of its terminal is told
    once.

    Example: invoke shell --container web
    """
    vm = _vm(context, name)
    if not guest:
        raise Exit(code=asyncio.run(execute(vm, container, SHELL, terminal=sys.stdin.isatty())))
    asyncio.run(console.console(vm.vsock_socket, console.console_port(vm.kernel_words)))
    if not is_serving(vm.agent_socket, timeout=1.0):
        raise UsageError(f"VM {name!r} has ended")


@task(
    help={
        "ports": "[ADDRESS:]PORT:PORT, the host's TCP port first (0: any that is free), or [ADDRESS:]PORT:vsock:PORT",
        "reverse": "connections of the guest to the host's vsock port go to the host's TCP port",
        "container": "its `nc` reaches the guest's TCP port; made on first use",
        "name": "the VM",
    }
)
def forward(
    context: Context, ports: str, reverse: bool = False, container: str = "default", name: str = "default"
) -> None:
    """Join a TCP port of the host to a port of the guest, until Ctrl-C or the VM's end.

    Example: invoke forward 8080:80
    """
    vm = _vm(context, name)
    rule = forwarding.Rule.parse(ports)
    if reverse and rule.kind != "vsock":
        raise UsageError("--reverse is for vsock ports: PORT:vsock:PORT")
    if reverse and (taken := [one for one in active_forwards(vm) if one.endswith(f"← vsock port {rule.guest}")]):
        raise UsageError(f"there is a forward of that port already: {taken[0]}")  # whose socket this would take away

    async def work() -> None:
        async with contextlib.AsyncExitStack() as stack:
            where: forwarding.Rule | Path = rule
            if rule.kind == "tcp":
                guest = await stack.enter_async_context(Guest(vm))
                serve = forwarding.to_container(await guest.container(container), rule.guest)
            elif reverse:
                where, serve = vm.host_port(rule.guest), forwarding.to_tcp(rule.address, rule.host)
            else:
                serve = forwarding.to_vsock(vm.vsock_socket, rule.guest)
            port = await stack.enter_async_context(forwarding.listening(where, serve, context.say))
            arrow = "←" if reverse else "→"
            address = f"{rule.address}:{rule.host if reverse else port}"
            what = f"{address} {arrow} {rule.kind} port {rule.guest}"
            stack.enter_context(forward_registry(vm).lease(what))
            stack.callback(forward_registry(vm).discard, what)
            context.say(f"{what} of {vm.name}")
            await forwarding.ended(stack.enter_context(vm.exit_fd()))

    asyncio.run(work())


CONTAINER = {"container": "its name", "name": "the VM"}
CONTAINERS = {"container": "only this one (default: all that commands have made)", "name": "the VM", "json": "as JSON"}


@task(help=CONTAINERS)
def ps(context: Context, container: str = "", name: str = "default", json: bool = False) -> None:
    """List the processes of containers; pids are the guest's. One without any has ended.

    Example: invoke ps --container web --json
    """
    vm = _vm(context, name)
    found = call_sync(vm, lambda agent: listing.processes(agent, container_registry(vm), container))
    rows = ({"container": one["container"]} | row for one in found for row in one["processes"] or [{}])
    listing.show(("container", *listing.COLUMNS), found, rows, as_json=json)


@task(help=CONTAINERS | {"interval": "seconds over which CPU usage is measured"})
def stats(
    context: Context, container: str = "", name: str = "default", interval: float = 1.0, json: bool = False
) -> None:
    """Show what containers use: CPU, memory (bytes), number of processes.

    Example: invoke stats --interval 5
    """
    vm = _vm(context, name)
    found = call_sync(vm, lambda agent: listing.stats(agent, container_registry(vm), container, interval))
    listing.show(listing.USAGE, found, found, as_json=json)


@task(help=CONTAINER | {"signal": "its number or name", "all": "signal all its processes, not only the first one"})
def kill(context: Context, container: str, signal: str = "TERM", all: bool = False, name: str = "default") -> None:
    """Send a signal to a container.

    Example: invoke kill web --signal HUP
    """
    number = listing.signal_number(signal)

    async def work(agent: Agent) -> None:
        await listing.signal_container(agent.container(container), number, everything=all)

    call_sync(_vm(context, name), work)


@task(help=CONTAINER)
def pause(context: Context, container: str, name: str = "default") -> None:
    """Let all processes of a container stand still.

    Example: invoke pause web
    """
    call_sync(_vm(context, name), lambda agent: agent.container(container).pause())


@task(help=CONTAINER)
def resume(context: Context, container: str, name: str = "default") -> None:
    """Let a paused container go on.

    Example: invoke resume web
    """
    call_sync(_vm(context, name), lambda agent: agent.container(container).resume())
