"""Attach the caller's standard streams to a process in a container, byte for byte."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import Any

from caisson.agent.client.caller import (
    FORWARDED,
    INPUT_CHUNK,
    MAX_STOPS,
    STOPS,
    output_error,
    raw_terminal,
    status_of,
    write_all,
)
from caisson.agent.client.connection import Process
from caisson.agent.client.errors import AgentError, Reason


async def attach(process: Process, *, stdin: int = 0, stdout: int = 1, stderr: int = 2) -> int:
    """Attach until the process has exited and all its output is delivered; returns its exit status.

    With a terminal, ``stdin`` is in raw mode meanwhile and its size is followed; it is always restored.  Signals are
    passed on, the third one to stop as SIGKILL; if the agent kills the process instead, the status is that of the
    signal.  When the reader of ``stdout`` or ``stderr`` goes away the process gets SIGPIPE, as in a pipeline, and the
    status is 141.

    Raises OutputError if they cannot be written for another reason, and AgentGone.
    """
    with raw_terminal(stdin) if process.terminal else contextlib.nullcontext():
        async with forward_signals(process, stdin) as stops:
            waiting = asyncio.create_task(process.wait())  # once its container is removed, its status is lost
            feeder = asyncio.create_task(_feed(process, stdin))
            try:
                copies = [_copy(process.stdout(), stdout)]
                if not process.terminal:
                    copies.append(_copy(process.stderr(), stderr))
                try:
                    await asyncio.gather(*copies)
                except OSError as error:
                    with contextlib.suppress(AgentError):
                        await process.signal(signal.SIGPIPE)
                    if isinstance(error, BrokenPipeError):
                        return 128 + signal.SIGPIPE
                    raise output_error(error) from error
                return status_of(await waiting, stops)
            finally:
                for task in (feeder, waiting):
                    task.cancel()
                    with contextlib.suppress(asyncio.CancelledError, AgentError):
                        await task


async def _copy(stream: AsyncIterator[bytes], target: int) -> None:
    try:
        async for data in stream:
            # In a thread: a slow reader must not block the other streams.
            await asyncio.to_thread(write_all, target, data)
    except AgentError as error:
        if error.reason != Reason.CONTAINER_NOT_FOUND:  # it was removed: this is the end of its output
            raise


async def _feed(process: Process, source: int) -> None:
    try:
        async for data in read(source):
            await process.write(data)
        await process.close_stdin()
    except AgentError:
        # It has exited or closed its input: unread input is not an error.
        pass


async def read(source: int) -> AsyncIterator[bytes]:
    """Read a descriptor of any type to its end.

    In its own thread, as regular files and shared terminals cannot be polled; a daemon thread, because a read that
    blocks forever must not keep the command alive.
    """
    loop = asyncio.get_running_loop()
    ready: asyncio.Queue[bytes] = asyncio.Queue()
    wanted = threading.Semaphore(1)

    def deliver() -> None:
        while wanted.acquire():
            try:
                data = os.read(source, INPUT_CHUNK)
            except OSError:
                data = b""
            try:
                loop.call_soon_threadsafe(ready.put_nowait, data)
            except RuntimeError:  # the loop has closed
                return
            if not data:
                return

    threading.Thread(target=deliver, name="stdin", daemon=True).start()
    while data := await ready.get():
        yield data
        wanted.release()


@contextlib.asynccontextmanager
async def forward_signals(process: Process, stdin: int) -> AsyncIterator[list[int]]:
    """Pass on signals and the size of the caller's terminal to the process; yields the stop signals received so far."""
    loop = asyncio.get_running_loop()
    tasks: set[asyncio.Task[None]] = set()
    stops: list[int] = []

    async def forward(number: int) -> None:
        with contextlib.suppress(AgentError):
            await process.signal(number)

    async def resize() -> None:
        with contextlib.suppress(AgentError, OSError):
            size = os.get_terminal_size(stdin)
            await process.resize(size.lines, size.columns)

    def start(work: object) -> None:
        task: asyncio.Task[None] = loop.create_task(work)  # type: ignore[arg-type]
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    def on_signal(number: int) -> None:
        if number in STOPS:
            stops.append(number)
        start(forward(signal.SIGKILL if len(stops) >= MAX_STOPS else number))

    # Not loop.add_signal_handler, which imports inspect to check its callback.
    def handle(number: int, action: Callable[[], None]) -> None:
        before[number] = signal.signal(number, lambda *_: loop.call_soon_threadsafe(action))

    before: dict[int, Any] = {}
    for forwarded in FORWARDED:
        handle(forwarded, partial(on_signal, forwarded))
    if process.terminal and os.isatty(stdin):
        await resize()
        handle(signal.SIGWINCH, lambda: start(resize()))
    try:
        yield stops
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for task in tasks:
            task.cancel()
        sys.stdout.flush()
