"""A guest for tests and programs of one's own: its agent, and a container to run programs in.

Whoever uses it has booted the guest (image.vm.VM, or a VM of another maker) and ends it: docs/library.md.
"""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, TypeVar

import grpc

from caisson.agent import client

T = TypeVar("T")


class Machine(Protocol):
    """What is asked of a VM: image.vm.VM has it."""

    @property
    def agent_socket(self) -> Path:
        """The Unix socket of its agent."""

    @property
    def directory(self) -> Path:
        """Where image.json says what is in it."""


def known(machine: Machine) -> client.Known:
    """The containers that were made in a VM."""
    return client.Known(machine.directory / "containers")


def forwards(machine: Machine) -> client.Known:
    """The ports that are forwarded, for as long as they are."""
    return client.Known(machine.directory / "ports")


def forwarded(machine: Machine) -> list[str]:
    """The ports that are forwarded now, in words: "127.0.0.1:8080 → tcp port 80"."""
    known = forwards(machine)
    for name in known.abandoned():
        known.discard(name)
    return known.names()


def ask(machine: Machine, work: Callable[[client.Agent], Awaitable[T]]) -> T:
    """What a VM's agent answers, for callers that are no coroutines.  Raises AgentError."""

    async def asked() -> T:
        async with client.Agent.connect(machine.agent_socket) as agent:
            return await work(agent)

    return asyncio.run(asked())


@dataclass(frozen=True)
class Done:
    """A program that has ended: its exit status (128+n for signal n) and what it wrote."""

    status: int
    stdout: bytes
    stderr: bytes


class Guest:
    """The guest of a running VM, for the time of a block."""

    def __init__(self, machine: Machine) -> None:
        self.machine = machine

    async def __aenter__(self) -> Self:
        """Raises AgentError when there is no agent."""
        self.agent = client.Agent.connect(self.machine.agent_socket)
        await self.agent.create_sandbox()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.agent.__aexit__()

    async def container(self, container_id: str = "default") -> client.Container:
        """The container of this id, made from the root file system in the image on first use."""
        try:
            contents = json.loads((self.machine.directory / "image.json").read_text())
        except FileNotFoundError as error:
            raise client.AgentGone(grpc.StatusCode.UNAVAILABLE, "the VM has ended") from error
        spec = client.default_spec(contents["containers"]["busybox"])
        container = await self.agent.ensure_container(container_id, spec)
        made = known(self.machine)
        if container_id not in made.names():  # what is known of one from an image says which disk it is on
            made.add(container_id)
        return container

    async def run(self, *words: str | os.PathLike[str], container: str = "default", stdin: bytes = b"") -> Done:
        """Run a program in a container to its end.  Raises ProgramError when it cannot be run."""
        process = await (await self.container(container)).exec([os.fspath(word) for word in words], env=[client.PATH])

        async def feed() -> None:
            if stdin:
                await process.write(stdin)
            await process.close_stdin()

        async def collect(errors: bool) -> bytes:
            return b"".join([data async for data in (process.stderr() if errors else process.stdout())])

        _, stdout, stderr = await asyncio.gather(feed(), collect(False), collect(True))
        return Done(await process.wait(), stdout, stderr)
