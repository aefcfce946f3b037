"""The guest's own shell, outside of all containers: the agent's debug console, on a vsock port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from caisson.agent.client.attach import raw, read, write_all
from caisson.agent.client.connection import CHUNK
from caisson.agent.client.errors import Mistake
from caisson.agent.client.vsock import dial
from caisson.agent.options import from_kernel

#: What a terminal takes for the end of its input (termios(3), VEOF).
END = b"\x04"
END_SECONDS = 0.5


def console_port(kernel_words: Iterable[str]) -> int:
    """The port on which the agent offers a shell, by its kernel's command line.  Raises Mistake when it offers none."""
    kind, _, port = from_kernel(kernel_words).console_listen.partition(":")
    if kind != "vsock":
        option = "--append agent.debug_console_vport=1026"
        raise Mistake(f"this guest offers no shell of its own; boot it with: invoke boot-vm {option}")
    return int(port)


async def console(socket: Path, port: int, *, stdin: int = 0, stdout: int = 1) -> None:
    """Join a shell of the guest and these descriptors until it ends, or the guest does.

    A terminal is in raw mode meanwhile, and restored whatever happens.  Its size is told once, as a command: the
    port carries what is typed and shown, and nothing else.
    """
    reader, writer = await dial(socket, port)

    async def feed() -> None:
        with contextlib.suppress(OSError):  # it has ended; whoever reads its output sees that
            if os.isatty(stdin):
                size = os.get_terminal_size(stdin)
                writer.write(f"stty rows {size.lines} columns {size.columns}\n".encode())
            async for data in read(stdin):
                writer.write(data)
                await writer.drain()
            while True:  # again and again: a line editor that is just being entered or left loses it
                writer.write(END)
                await writer.drain()
                await asyncio.sleep(END_SECONDS)

    try:
        with raw(stdin), _ended_by_signals():
            feeder = asyncio.create_task(feed())
            try:
                while data := await _received(reader):
                    await asyncio.to_thread(write_all, stdout, data)
            finally:
                feeder.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await feeder
    finally:
        writer.close()


@contextlib.contextmanager
def _ended_by_signals() -> Iterator[None]:
    """Signals that end a program end this block, so that what it has changed is changed back."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None
    for number in (signal.SIGTERM, signal.SIGHUP):
        loop.add_signal_handler(number, task.cancel)
    try:
        yield
    finally:
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.remove_signal_handler(number)


async def _received(reader: asyncio.StreamReader) -> bytes:
    try:
        return await reader.read(CHUNK)
    except OSError:
        return b""
