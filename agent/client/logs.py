"""Detached containers: keep and show their output, wait for their exit, attach to them again."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import re
import time
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import AsyncExitStack

from caisson.agent.client.caller import raw_terminal, status_of, write_all
from caisson.agent.client.connection import Agent, Container, Process
from caisson.agent.client.errors import AgentError, UsageError
from caisson.agent.client.stdio import forward_signals, read
from caisson.proto.caisson import caisson_pb2
from caisson.proto.foreign_text import TerminalFilter

#: Bytes of a detached container's output to keep in the guest.
MAX_LOG = 4 << 20

#: The key sequence to detach on a terminal: Ctrl-P, Ctrl-Q.
DETACH = b"\x10\x11"

UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}

Entry = caisson_pb2.ReadLogResponse.Entry


async def keep(agent: Agent, container_id: str) -> None:
    """Make the guest drain a container's output and keep the last of it.  Raises AgentError."""
    await agent.guest.KeepLog(caisson_pb2.KeepLogRequest(container_id=container_id, max_bytes=MAX_LOG))


async def restart(agent: Agent, container: Container) -> None:
    """Run the program of an exited container again, on the files that it left.  Raises AgentError."""
    await container.recreate()
    await keep(agent, container.id)
    await container.start()


async def entries(agent: Agent, container_id: str, *, follow: bool = False, begin: int = 0) -> AsyncIterator[Entry]:
    """Yield a container's kept output, with ``follow`` until it has exited.  Raises AgentError."""
    while True:
        request = caisson_pb2.ReadLogRequest(container_id=container_id, begin=begin, follow=follow)
        answer = await agent.guest.ReadLog(request)
        for entry in answer.entries:
            yield entry
            begin = entry.number + len(entry.data)
        if answer.ended or not (follow or answer.entries):
            return


async def show(
    agent: Agent, container_id: str, *, follow: bool = False, since: float = 0.0, tail: int | None = None
) -> None:
    """Write a container's output to standard output and error; to a terminal without its control characters.

    The viewer may not be the user who ran the program.  ``since`` is in seconds since 1970; with ``tail``, only the
    last lines are shown.  Raises AgentError, OSError.
    """
    begin = 0
    with _stream_writer() as write:
        if tail is not None:
            kept = [one async for one in entries(agent, container_id)]
            for stream, data in last_lines([(one.stream, one.data) for one in kept if one.time >= since * 1e9], tail):
                await asyncio.to_thread(write, stream, data)
            begin = kept[-1].number + len(kept[-1].data) if kept else 0
            if not follow:
                return
        async for entry in entries(agent, container_id, follow=follow, begin=begin):
            if entry.time >= since * 1e9:
                await asyncio.to_thread(write, entry.stream, entry.data)


@contextlib.contextmanager
def _stream_writer() -> Iterator[Callable[[int, bytes], None]]:
    """Yield a writer to a standard stream: unchanged, or without control characters if it is a terminal."""
    filters = {stream: TerminalFilter() for stream in (1, 2) if os.isatty(stream)}

    def write(stream: int, data: bytes) -> None:
        write_all(stream, filters[stream](data) if stream in filters else data)

    yield write
    for stream, filtered in filters.items():
        write_all(stream, filtered(b"", final=True))


def last_lines(pieces: list[tuple[int, bytes]], count: int) -> list[tuple[int, bytes]]:
    """Return the last lines of pieces of output, each with its stream."""
    found: list[tuple[int, bytes]] = []
    lines = 0
    for stream, data in reversed(pieces):
        cut = 0
        for at in range(len(data) - 1, -1, -1):
            last = not found and at == len(data) - 1
            if data[at] == 0x0A and not last:
                lines += 1
                if lines >= count:
                    cut = at + 1
                    break
        if count == 0:
            return []
        found.append((stream, data[cut:]))
        if lines >= count:
            break
    return found[::-1]


def parse_time(text: str) -> float:
    """Parse a time, in seconds since 1970: 10m (ago), an ISO date and time, or seconds.  Raises UsageError."""
    if ago := re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd])", text):
        return time.time() - float(ago[1]) * UNITS[ago[2]]
    if re.fullmatch(r"[0-9]+(\.[0-9]+)?", text):
        return float(text)
    try:
        return datetime.datetime.fromisoformat(text).timestamp()
    except ValueError:
        raise UsageError(f"--since {text!r}: is not a time; give 10m, 2026-11-27T12:00 or seconds since 1970") from None


async def attach_detached(agent: Agent, container: Container, *, terminal: bool) -> int | None:
    """Attach to a detached container's init process until it exits, or the detach keys are typed; returns its exit
    status.

    None if detached.  Earlier output is not shown.  Raises AgentError, OSError.
    """
    process = container.init(terminal=terminal)
    begin = 0
    async for entry in entries(agent, container.id):
        begin = entry.number + len(entry.data)
    detached = asyncio.Event()

    async def show_output() -> None:
        async for entry in entries(agent, container.id, follow=True, begin=begin):
            await asyncio.to_thread(write_all, entry.stream, entry.data)

    async with AsyncExitStack() as stack:
        stack.enter_context(raw_terminal(0) if terminal else contextlib.nullcontext())
        stops = await stack.enter_async_context(forward_signals(process, 0))
        output = asyncio.create_task(show_output())
        feeder = asyncio.create_task(_feed(process, terminal, detached.set))
        leaving = asyncio.create_task(detached.wait())
        try:
            await asyncio.wait({output, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if detached.is_set():
                return None
            await output
            return status_of(await process.wait(), stops)
        finally:
            for task in (output, feeder, leaving):
                task.cancel()
            await asyncio.gather(output, feeder, leaving, return_exceptions=True)


async def _feed(process: Process, terminal: bool, detach: Callable[[], None]) -> None:
    held = b""
    with contextlib.suppress(AgentError):
        async for data in read(0):
            data = held + data
            held = b""
            if terminal and DETACH in data:
                await process.write(data[: data.index(DETACH)])
                detach()
                return
            if terminal and data.endswith(DETACH[:1]):
                data, held = data[:-1], data[-1:]
            if data:
                await process.write(data)
        await process.write(held)
        if not terminal:
            await process.close_stdin()
