"""Test the log and the debug console, each on its own socket."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.native.agent_support import TIMEOUT, RunningAgent, run
from tests.support.poll import until

pytestmark = pytest.mark.root


@pytest.fixture
def talkative(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> Iterator[RunningAgent]:
    """Start an agent with both."""
    options = [f"--log-listen=unix:{tmp_path}/log.sock", f"--debug-console=unix:{tmp_path}/console.sock"]
    running = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, *options)
    yield running
    running.stop()


@contextmanager
def connected(agent: RunningAgent, name: str) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(TIMEOUT)
        connection.connect(str(agent.socket.with_name(name)))
        yield connection


def read_until(connection: socket.socket, mark: bytes) -> bytes:
    data = b""
    while mark not in data:
        more = connection.recv(4096)
        assert more, data
        data += more
    return data


def test_the_log_comes_with_what_was_before(talkative: RunningAgent) -> None:
    async def request() -> None:
        async with talkative.connect() as client:
            await client.version()

    run(request())
    with connected(talkative, "log.sock") as first, connected(talkative, "log.sock") as second:
        for connection in (first, second):
            lines = read_until(connection, b'"method": "Version"')
            assert json.loads(lines.splitlines()[0])["level"] == "debug"
        run(request())
        for connection in (first, second):
            assert b'"Version"' in read_until(connection, b'"method": "Version"')


def test_a_reader_that_does_not_read_is_told_what_it_lost(talkative: RunningAgent) -> None:
    async def many() -> None:
        async with talkative.connect() as client:
            for _ in range(10_000):
                await client.version()

    with connected(talkative, "log.sock") as connection:
        run(many())
        assert b"lines were lost: read too slowly" in read_until(connection, b"lines were lost: read too slowly")
        assert b"Version" in read_until(connection, b"Version")


def test_a_shell_on_a_terminal(talkative: RunningAgent) -> None:
    with connected(talkative, "console.sock") as connection:
        connection.sendall(b"tty; stty size; echo session-$(cut -d' ' -f6 /proc/$$/stat)-$$-\n")
        seen = b""
        while (found := re.search(rb"session-(\d+)-(\d+)-", seen)) is None:
            seen += connection.recv(4096)
        assert found[1] == found[2]
        assert b"/dev/pts/" in seen and b"24 80" in seen
        connection.sendall(b"sh -c 'echo sleeping-$((1 + 1)); exec sleep 1000'\n")
        read_until(connection, b"sleeping-2")
        connection.sendall(b"\x03")  # ^C reaches the foreground process
        connection.sendall(b"echo still-$((1 + 1))\nexit\n")
        read_until(connection, b"still-2")
        while connection.recv(4096):
            pass  # EOF follows the shell's exit


def test_closed_console_leaves_nothing(talkative: RunningAgent) -> None:
    fds = talkative.fds()
    with connected(talkative, "console.sock") as connection:
        connection.sendall(b"trap '' HUP TERM; echo pid-$$-\n")
        read_until(connection, b"pid-")
        assert talkative.children()

    async def gone() -> None:
        await until(lambda: not talkative.children(), "the shell has ended")
        await until(lambda: talkative.fds() <= fds, "its descriptors are closed")

    run(gone())


def test_stops_with_everything_connected(talkative: RunningAgent) -> None:
    with connected(talkative, "console.sock") as console, connected(talkative, "log.sock") as log:
        console.sendall(b"echo up-$((1 + 1))\n")
        read_until(console, b"up-2")
        talkative.process.terminate()
        assert talkative.process.wait(TIMEOUT) == 0
        while log.recv(4096):
            pass
