"""Attach to the agent's debug console: a shell of the guest, outside all containers, on a vsock port."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path

from caisson.agent.client.connection import CHUNK
from caisson.agent.client.errors import UsageError
from caisson.agent.client.forward import dial
from caisson.agent.client.stdio import raw, read, write_all
from caisson.agent.options import from_kernel

#: What a terminal takes for the end of its input (termios(3), VEOF).
END = b"\x04"
END_INTERVAL = 0.5


def console_port(kernel_words: Iterable[str]) -> int:
    """Return the vsock port of the debug console, from the kernel's command line.  Raises UsageError without one."""
    kind, _, port = from_kernel(kernel_words).console_listen.partition(":")
    if kind != "vsock":
        option = "--append agent.debug_console_vport=1026"
        raise UsageError(f"guest: has no debug console; boot it with: caisson boot-vm {option}")
    return int(port)


async def console(socket: Path, port: int, *, stdin: int = 0, stdout: int = 1) -> None:
    """Attach these descriptors to a shell of the guest until it or the guest ends.

    A terminal is in raw mode meanwhile and is always restored.  Its size is sent once, as a command: the port carries
    typed and shown bytes only.
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
                await asyncio.sleep(END_INTERVAL)

    try:
        with raw(stdin), _cancelled_by_signals():
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
def _cancelled_by_signals() -> Iterator[None]:
    """Cancel the block on SIGTERM and SIGHUP, so that it restores the terminal."""
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
