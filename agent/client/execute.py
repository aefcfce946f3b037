"""Run a program in a container for a command line: its streams and exit status are the caller's.

In a container that runs this is one call, and then those of the program's streams.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Sequence

from caisson.agent.client.connection import Container, Process
from caisson.agent.client.errors import AgentError, AgentGone, Reason, container_explained
from caisson.agent.client.guest import DEFAULT, Guest, Machine
from caisson.agent.client.specs import PATH, terminal_env
from caisson.agent.client.stdio import attach

#: Of the default container before its first use, or when its first process has ended.
NOT_THERE = (Reason.CONTAINER_NOT_FOUND, Reason.CONTAINER_STOPPED)

#: Seconds for which a program that is starting is looked for after Ctrl-C, and between two looks.
KILL_TIMEOUT = 1.0
KILL_INTERVAL = 0.05


async def execute(
    machine: Machine,
    container_id: str,
    words: Sequence[str],
    *,
    env: Sequence[str] = (),
    cwd: str = "/",
    user: tuple[int, int] = (0, 0),
    terminal: bool = False,
) -> int:
    """Run a program in a container that runs (the VM's default one is created on first use); returns its exit status.

    Raises ContainerUnavailable for one that has exited or never was, ProgramError when the program cannot be run, and
    as `attach` does.
    """
    uid, gid = user
    environment = [PATH, "HOME=/root" if uid == 0 else "HOME=/", *terminal_env(terminal), *env]
    exec_id, size = os.urandom(16).hex(), terminal_size(terminal)

    async def start(container: Container) -> Process:
        return await container.exec(
            words, env=environment, cwd=cwd, uid=uid, gid=gid, terminal=terminal, size=size, exec_id=exec_id
        )

    async with Guest(machine) as guest:
        container = guest.agent.container(container_id)
        try:
            with container_explained(container_id):
                try:
                    process = await start(container)
                except AgentError as error:
                    if container_id != DEFAULT or not (isinstance(error, AgentGone) or error.reason in NOT_THERE):
                        raise
                    process = await start(await guest.container())  # by the same id: it is not run twice
            return await attach(process)
        except (asyncio.CancelledError, KeyboardInterrupt):
            await _kill(container.process(exec_id))
            raise


async def _kill(process: Process) -> None:
    """Kill a process that may still be starting: nobody will attach to it."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(KILL_TIMEOUT):
            while True:
                with contextlib.suppress(AgentError):
                    await process.signal(signal.SIGKILL)
                    return
                await asyncio.sleep(KILL_INTERVAL)


def terminal_size(terminal: bool) -> tuple[int, int] | None:
    """Return the rows and columns of the caller's terminal: a program may ask before it could be told later."""
    with contextlib.suppress(OSError, ValueError):
        size = os.get_terminal_size(0)
        if terminal and size.lines and size.columns:
            return size.lines, size.columns
    return None
