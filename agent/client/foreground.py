"""Run images as containers for a command line: their streams and exit status are passed through."""

from __future__ import annotations

import asyncio
import contextlib
import signal
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from caisson.agent.client.caller import ROOT, console_size, terminal_env
from caisson.agent.client.connection import Agent, Container, Process
from caisson.agent.client.errors import AgentError
from caisson.agent.client.guest import Guest, Machine, busybox_root, resolver_lines
from caisson.agent.client.logs import keep
from caisson.agent.client.share import OPTIONS as SHARE_OPTIONS
from caisson.agent.client.share import when_plugged
from caisson.agent.client.specs import Document, guest_document
from caisson.agent.client.stdio import attach
from caisson.proto.caisson import caisson_pb2
from caisson.proto.contract import GUEST_SHARED
from caisson.proto.kata3 import agent_pb2

if TYPE_CHECKING:
    from caisson.agent.client.run_specs import SharedVolume

#: Seconds from the stop signal to SIGKILL, and to wait for an out-of-memory event.
STOP_TIMEOUT = 10.0
OOM_TIMEOUT = 1.0

#: Exit statuses: of a process killed by SIGKILL, and of timeout(1).
KILLED = 128 + signal.SIGKILL
TIMED_OUT = 124


async def execute_in_guest(
    machine: Machine,
    container_id: str,
    words: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str = "/",
    user: Mapping[str, Any] = ROOT,
    terminal: bool = False,
) -> int:
    """Run a program in the guest's own root, with all privileges; returns its exit status.

    Meanwhile it is the init process of a container with this id, whose root is the guest's with all its mounts.  Raises
    ProgramError when the program cannot be run, and as `attach` does.
    """
    document = guest_document(words, busybox_root(machine), env=[*terminal_env(terminal), *env], cwd=cwd, user=user)
    document["process"] |= {"terminal": terminal, **console_size(terminal)}
    # Shared by all: the agent mounts it for the first and unmounts it after the last.
    document["root"]["path"] = f"{GUEST_SHARED}/guest/root"
    root = _storage("bind", "/", "bind", document["root"]["path"], ["rbind", "rprivate"])
    async with Guest(machine) as guest:
        await guest.agent.create_sandbox()
        container = await guest.agent.create_container(container_id, document, [root])
        try:
            await container.start()
            return await _attach(container, terminal, 0)
        finally:
            with contextlib.suppress(AgentError):
                await container.remove()


async def run_image(
    machine: Machine,
    container_id: str,
    document: Document,
    pci_path: str,
    *,
    detach: bool,
    volumes: Sequence[SharedVolume] = (),
    timeout: float = 0.0,
    report: Callable[[str], None] = lambda line: None,
) -> int | None:
    """Run a container whose root is on a plugged disk; returns its exit status, None when detached.

    Unless detached, the container is removed when it exits; after ``timeout`` seconds (0: never) it is stopped, and the
    status is that of timeout(1).  ``report`` gets a line about fields that the guest ignores, and about running out of
    memory. Raises AgentError.
    """
    dns = resolver_lines(machine)
    async with Agent.connect(machine.agent_socket, "ttrpc") as agent:
        container = agent.container(container_id)
        terminal = bool(document["process"].get("terminal"))
        document["process"] |= console_size(terminal)
        running = False
        try:
            for warning in await create_on_disk(agent, container_id, document, pci_path, "squashfs", volumes, dns):
                report(warning)
            if detach:
                await keep(agent, container_id)
            await container.start()
            if detach:
                running = True
                return None
            status = await _attach(container, terminal, timeout)
            if status == KILLED and await _out_of_memory(agent, container_id):
                limit = ((document["linux"].get("resources") or {}).get("memory") or {}).get("limit", 0)
                report(
                    f"container {container_id}: out of memory: limit {limit / (1 << 20):.0f} MiB; raise it: --memory"
                )
            return status
        finally:
            if not running:
                with contextlib.suppress(AgentError):
                    await container.remove()


async def _attach(container: Container, terminal: bool, timeout: float) -> int:
    process = container.init(terminal=terminal)
    timer = asyncio.create_task(_stop_after(process, timeout)) if timeout else None
    try:
        status = await attach(process)
        return TIMED_OUT if timer is not None and timer.done() else status
    finally:
        if timer is not None:
            timer.cancel()


async def _stop_after(process: Process, timeout: float) -> None:
    await asyncio.sleep(timeout)
    with contextlib.suppress(AgentError):
        await process.signal(signal.SIGTERM)
    asyncio.get_running_loop().call_later(STOP_TIMEOUT, lambda: asyncio.ensure_future(_kill(process)))


async def _kill(process: Process) -> None:
    with contextlib.suppress(AgentError):
        await process.signal(signal.SIGKILL)


async def _out_of_memory(agent: Agent, container_id: str) -> bool:
    """Check whether the OOM killer has killed a process of the container."""
    request = agent_pb2.GetOOMEventRequest()
    with contextlib.suppress(AgentError, TimeoutError):
        async with asyncio.timeout(OOM_TIMEOUT):  # for all: a hostile guest reports as many as it likes
            while (await agent.rpc.GetOOMEvent(request, timeout=OOM_TIMEOUT)).container_id != container_id:
                pass
            return True
    return False


async def create_on_disk(
    agent: Agent,
    container_id: str,
    document: Document,
    pci_path: str,
    fstype: str,
    volumes: Sequence[SharedVolume] = (),
    dns: Sequence[str] = (),
) -> list[str]:
    """Create a container on a disk, waiting for the disk to appear; returns the guest's warnings.

    Sets the document's root; ``dns`` are the lines of its resolv.conf.  Raises AgentError.
    """
    # Unique: the agent keeps "local" directories until the sandbox's end, a layer ends with its container.
    place = f"{GUEST_SHARED}/{uuid.uuid4().hex}"
    document["root"]["path"] = f"{place}/root"
    mounted = storages(pci_path, place, fstype)
    for number, volume in enumerate(volumes):
        mode = "rw" if volume.writable else "ro"
        options = [*SHARE_OPTIONS.get(volume.fstype, ()), mode]
        mounted.append(_storage("mmioblk", volume.tag, volume.fstype, f"{place}/volume-{number}", options))
        bind = {"type": "bind", "source": f"{place}/volume-{number}", "options": ["rbind", "nosuid", "nodev", mode]}
        document["mounts"].append({"destination": volume.destination, **bind})
    await agent.create_sandbox()
    await _write_files(agent, document, place, dns)
    return await when_plugged(lambda: agent.create_container_reporting(container_id, document, mounted))


async def _write_files(agent: Agent, document: Document, place: str, dns: Sequence[str]) -> None:
    """Give a container /etc/hosts, /etc/hostname and /etc/resolv.conf, as engines do."""
    name = document.get("hostname") or "localhost"
    contents = {
        "hosts": f"127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\n127.0.1.1\t{name}\n",
        "hostname": f"{name}\n",
        "resolv.conf": "".join(f"{line}\n" for line in dns),
    }
    taken = {str(mount.get("destination")) for mount in document["mounts"]}
    for file, text in contents.items():
        if f"/etc/{file}" in taken:
            continue
        data = text.encode()
        await agent.rpc.CopyFile(
            agent_pb2.CopyFileRequest(
                path=f"{place}/{file}", data=data, file_size=len(data), file_mode=0o644, dir_mode=0o755
            )
        )
        bind = {"type": "bind", "source": f"{place}/{file}", "options": ["rbind", "rw"]}
        document["mounts"].append({"destination": f"/etc/{file}", **bind})


def storages(pci_path: str, place: str, fstype: str) -> list[caisson_pb2.Storage]:
    """Return the mounts of a writable root: the disk at ``place``/lower, an overlay with a tmpfs at ``place``/root.

    These drivers' sources are used unchanged by the agent; "local" creates directories.
    """
    lower, upper, work = f"{place}/lower", f"{place}/layer/upper", f"{place}/layer/work"
    layers = [f"lowerdir={lower}", f"upperdir={upper}", f"workdir={work}"]
    wanted = (
        ("blk", pci_path, fstype, lower, ["ro", "nodev"]),
        ("mmioblk", "tmpfs", "tmpfs", f"{place}/layer", ["mode=0700"]),
        ("local", "local", "local", upper, ["mode=0755"]),
        ("local", "local", "local", work, ["mode=0755"]),
        ("mmioblk", "overlay", "overlay", f"{place}/root", layers),
    )
    return [_storage(*one) for one in wanted]


def _storage(driver: str, source: str, fstype: str, mount_point: str, options: Sequence[str]) -> caisson_pb2.Storage:
    return caisson_pb2.Storage(driver=driver, source=source, fstype=fstype, mount_point=mount_point, options=options)
