"""Run programs in the guest itself, and give containers shared directories and ports."""

from __future__ import annotations

import asyncio
import contextlib
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from caisson.agent.client import foreground
from caisson.agent.client import forward as forwarding
from caisson.agent.client import share as mounting
from caisson.agent.client.connection import call_sync
from caisson.agent.client.errors import UsageError, explain_container_errors
from caisson.agent.client.guest import Guest
from caisson.agent.client.registry import active_forwards, container_registry, forward_registry
from caisson.commands.container import remove_orphaned
from caisson.commands.running import running_vm
from caisson.commands.streams import info
from caisson.image.vm import RunningVM
from caisson.image.vm.hotplug import share as sharing


def execute_in_guest(vm: RunningVM, words: Sequence[str], *, terminal: bool, **options: Any) -> int:
    """Run a program in the guest itself; its temporary container is leased, in case this process is killed."""
    remove_orphaned(vm)
    container, registry = f"guest-{uuid.uuid4().hex[:8]}", container_registry(vm)
    with registry.lease(container):
        try:
            return asyncio.run(foreground.execute_in_guest(vm, container, words, terminal=terminal, **options))
        finally:
            registry.discard(container)


def share(*, directory: str, name: str, container: str, at: str, tag: str, writable: bool, only_plug: bool) -> None:
    """Share a directory and mount it in a container; prints where."""
    with running_vm(name) as vm, explain_container_errors(container):
        shared = sharing.share(vm, Path(directory), tag, writable=writable)
        if only_plug:
            print(shared.tag)
            return
        place = at or f"{mounting.SHARED}/{shared.tag}"
        try:
            asyncio.run(mounting.mount(vm, container, shared.fstype, shared.tag, place, writable=writable))
        except BaseException:
            if shared.new:
                sharing.unshare(vm, shared.tag)
            raise
    mode = "writable" if writable else "read-only"
    info(f"{directory}: {shared.fstype}, {mode}, until: caisson unshare {shared.tag}")
    print(place)


def unshare(*, tag: str, name: str) -> None:
    """Unmount a share in all containers and unplug it."""
    with running_vm(name) as vm:
        call_sync(vm, lambda agent: mounting.unmount(agent, tag))
        sharing.unshare(vm, tag)


def forward(*, ports: str, reverse: bool, container: str, name: str) -> None:
    """Forward a TCP port of the host to a port of the guest, until Ctrl-C or until the VM stops."""
    rule = forwarding.ForwardRule.parse(ports)
    if reverse and rule.kind != "vsock":
        raise UsageError(f"--reverse: is for vsock ports, not {ports!r}; give PORT:vsock:PORT")
    with running_vm(name) as vm:
        if reverse and (taken := [one for one in active_forwards(vm) if one.endswith(f"← vsock port {rule.guest}")]):
            raise UsageError(f"vsock port {rule.guest}: is forwarded already ({taken[0]}); choose another")
        asyncio.run(_forward(vm, rule, reverse, container))


async def _forward(vm: RunningVM, rule: forwarding.ForwardRule, reverse: bool, container: str) -> None:
    async with contextlib.AsyncExitStack() as stack:
        where: forwarding.ForwardRule | Path = rule
        if rule.kind == "tcp":
            guest = await stack.enter_async_context(Guest(vm))
            serve = forwarding.to_container(await guest.find_container(container), rule.guest)
        elif reverse:
            where, serve = vm.host_port(rule.guest), forwarding.to_tcp(rule.address, rule.host)
        else:
            serve = forwarding.to_vsock(vm.vsock_socket, rule.guest)
        port = await stack.enter_async_context(forwarding.listening(where, serve, info))
        arrow = "←" if reverse else "→"
        what = f"{rule.address}:{rule.host if reverse else port} {arrow} {rule.kind} port {rule.guest}"
        stack.enter_context(forward_registry(vm).lease(what))
        stack.callback(forward_registry(vm).discard, what)
        info(f"{what} of {vm.name}")
        await forwarding.wait_readable(stack.enter_context(vm.exit_fd()))
        info(f"VM {vm.name!r}: the VM has ended: {vm.exit_reason()}")
