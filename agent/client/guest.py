"""Drive a guest from tests and programs: its agent, and a container to run programs in.

The caller boots and stops the guest (image.vm.VM, or another VMM's): docs/library.md.
"""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Self

from caisson.agent import client
from caisson.agent.client.caller import DEFAULT
from caisson.agent.client.registry import container_registry

#: Seconds to wait for the agent of a starting VM, and between two checks that the VM is still running.
AGENT_TIMEOUT = 60.0
CHECK_INTERVAL = 3.0


class Machine(Protocol):
    """The part of a VM that the client needs; image.vm.VM has it."""

    @property
    def agent_socket(self) -> Path:
        """The Unix socket of its agent."""

    @property
    def directory(self) -> Path:
        """The directory with image.json."""


@dataclass(frozen=True)
class CompletedRun:
    """The exit status (128+n for signal n) and the output of a program."""

    status: int
    stdout: bytes
    stderr: bytes


def guest_memory(machine: Machine) -> int:
    """Return a VM's memory in bytes; 0 if unknown."""
    return int(_description(machine).get("memory") or 0) << 20


def guest_cpus(machine: Machine) -> int:
    """Return the maximum CPUs of a VM, including hot-plug; 1 if unknown."""
    vm = _description(machine)
    return max(1, int(vm.get("cpus") or 1), int(vm.get("max_cpus") or 0))


def resolver_lines(machine: Machine) -> list[str]:
    """Return the lines of resolv.conf for a VM's network, none if it has no network."""
    return [f"nameserver {server}" for server in (_description(machine).get("network") or {}).get("dns") or ()]


def busybox_root(machine: Machine) -> str:
    """Return the directory of the guest with busybox and links for its applets.  Raises AgentGone."""
    return str(_manifest(machine)["containers"]["busybox"])


def _manifest(machine: Machine) -> dict[str, Any]:
    try:
        return dict(json.loads((machine.directory / "image.json").read_text()))
    except FileNotFoundError as error:
        raise client.AgentGone("the VM has ended") from error


def _description(machine: Machine) -> dict[str, Any]:
    try:
        return dict(json.loads((machine.directory / "vm.json").read_text()))
    except (OSError, ValueError, TypeError):
        return {}


class Guest:
    """A connection to the guest of a running VM, for a `with` block."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    async def __aenter__(self) -> Self:
        """Connect; nothing is sent yet."""
        self.agent = client.Agent.connect(self.machine.agent_socket, "ttrpc")
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.agent.__aexit__()

    async def container(self, container_id: str = DEFAULT) -> client.Container:
        """Return the container of this id, created on first use from the image's own root file system."""
        contents = _manifest(self.machine)
        from caisson.agent.client import specs  # late, as below: most calls create no container

        document = specs.container_document(contents["containers"]["busybox"])
        architecture = str(contents.get("arch", "amd64"))
        specs.confine(document, guest_memory(self.machine), architecture, guest_cpus(self.machine))
        # Before: a command interrupted here has still created it.  After: a listing may have come in between.
        self._register(container_id)
        container = await self._ensure(container_id, document)
        self._register(container_id)
        return container

    def _register(self, container_id: str) -> None:
        """Register a container, unless it already is; the entry of one from a container image names its disk."""
        made = container_registry(self.machine)
        if container_id not in made.names():
            made.add(container_id)

    async def find_container(self, container_id: str) -> client.Container:
        """Return the container of this id: only the VM's default one is created on first use."""
        return await self.container() if container_id == DEFAULT else self.agent.container(container_id)

    async def _ensure(self, container_id: str, spec: Mapping[str, Any]) -> client.Container:
        """Call an agent that may still be starting: wait for it only if the call fails."""
        try:
            return await self.agent.ensure_container(container_id, spec)
        except client.AgentGone:
            deadline = time.monotonic() + AGENT_TIMEOUT
            while not await asyncio.to_thread(client.is_serving, self.machine.agent_socket, CHECK_INTERVAL):
                if time.monotonic() > deadline or not self.machine.agent_socket.exists():
                    raise
            return await self.agent.ensure_container(container_id, spec)

    async def run(self, *words: str | os.PathLike[str], container: str = DEFAULT, stdin: bytes = b"") -> CompletedRun:
        """Run a program in a container to completion.  Raises ProgramError when it cannot be run."""
        process = await (await self.container(container)).exec([os.fspath(word) for word in words], env=[client.PATH])

        async def feed() -> None:
            if stdin:
                await process.write(stdin)
            await process.close_stdin()

        async def collect(errors: bool) -> bytes:
            return b"".join([data async for data in (process.stderr() if errors else process.stdout())])

        _, stdout, stderr = await asyncio.gather(feed(), collect(False), collect(True))
        return CompletedRun(await process.wait(), stdout, stderr)
