"""Test where an agent listens, and who may connect."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.log import Log
from caisson.agent.debug_ports import VsockListener
from caisson.agent.rpc.listener import ListenError, accept, listen


class Lines:
    """A log for inspection."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []
        self.said = asyncio.Event()

    def __call__(self, level: str, message: str, **fields: object) -> None:
        self.lines.append((level, message, fields))
        self.said.set()


class Echo(asyncio.Protocol):
    """Echoes what it receives."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def data_received(self, data: bytes) -> None:
        self.transport.write(data)


@contextlib.asynccontextmanager
async def accepting(directory: Path) -> AsyncIterator[tuple[Path, Lines]]:
    """Serve an echo at an address; yield its log.  No descriptor is left open."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    listener, log = listen(f"unix:{directory / 'front'}"), Lines()
    task = asyncio.ensure_future(accept(listener, Echo, log))  # type: ignore[arg-type]
    yield directory / "front", log
    task.cancel()
    await asyncio.wait([task])
    listener.close()
    for _ in range(1000):
        if len(list(Path("/proc/self/fd").iterdir())) == before:
            break
        await asyncio.sleep(0.005)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_unix_socket_is_for_its_owner(tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        listener = listen(f"unix:{tmp_path / 's'}")
        assert os.umask(0) == 0  # restored
    finally:
        os.umask(before)
    assert (tmp_path / "s").stat().st_mode & 0o777 == 0o600
    listener.close()


@pytest.mark.parametrize(
    "address", ["", "unix", "unix:/no/such/directory/s", "tcp:80", "vsock:", "vsock:x", "vsock:-2"]
)
def test_listen_rejects_malformed_addresses(address: str) -> None:
    with pytest.raises(ListenError, match=r"not a valid address|cannot listen"):
        listen(address).close()


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    first = listen(f"unix:{tmp_path / 's'}")
    with pytest.raises(ListenError, match="already in use"):
        listen(f"unix:{tmp_path / 's'}")
    first.close()


async def test_each_connection_has_a_protocol_of_its_own(tmp_path: Path) -> None:
    async with accepting(tmp_path) as (front, log):
        streams = [await asyncio.open_unix_connection(front) for _ in range(50)]
        for number, (_, writer) in enumerate(streams):
            writer.write(b"%03d" % number)
        for number, (reader, writer) in enumerate(streams):
            assert await reader.readexactly(3) == b"%03d" % number
            writer.close()
        assert log.lines == []


async def test_connections_that_say_nothing_or_break_off_leave_nothing(tmp_path: Path) -> None:
    async with accepting(tmp_path) as (front, log):
        for opening in (b"", b"x"):
            for _ in range(20):
                _, writer = await asyncio.open_unix_connection(front)
                writer.write(opening)
                await asyncio.sleep(0)
                writer.transport.abort()
        assert log.lines == []


@pytest.mark.parametrize(("cid", "welcome"), [(2, True), (1, False), (3, False), (0xFFFFFFFF, False)])
async def test_on_vsock_only_the_host_is_welcome(cid: int, welcome: bool) -> None:
    class Connection:
        family = socket.AF_VSOCK
        closed = False

        def close(self) -> None:
            self.closed = True

    connection, log, joined = Connection(), Lines(), asyncio.Event()
    accepted: list[Connection] = []

    async def sock_accept(listener: socket.socket) -> tuple[Any, Any]:
        if accepted:
            await asyncio.Event().wait()
        accepted.append(connection)
        return connection, (cid, 1234)

    async def connect(protocol: Any, connection: Any) -> None:
        joined.set()

    loop = asyncio.get_running_loop()
    loop.sock_accept = sock_accept  # type: ignore[assignment]
    loop.connect_accepted_socket = connect  # type: ignore[assignment]
    with socket.socket() as listener:
        task = asyncio.ensure_future(accept(listener, Echo, log))  # type: ignore[arg-type]
        async with asyncio.timeout(60):  # it is either awaited or reported
            await (joined.wait() if welcome else log.said.wait())
        task.cancel()
    assert (joined.is_set(), connection.closed) == (welcome, not welcome)
    if not welcome:
        assert log.lines == [("warning", "refused a connection that is not from the host", {"cid": cid})]


async def test_a_lack_of_descriptors_passes(tmp_path: Path) -> None:
    async with accepting(tmp_path) as (front, log):
        loop, failures = asyncio.get_running_loop(), 2
        sock_accept = loop.sock_accept

        async def failing(listener: socket.socket) -> Any:
            nonlocal failures
            connection = await sock_accept(listener)
            if failures:
                failures -= 1
                connection[0].close()
                raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
            return connection

        loop.sock_accept = failing  # type: ignore[assignment]
        data = b""
        while failures or data != b"x":
            reader, writer = await asyncio.open_unix_connection(front)
            with contextlib.suppress(ConnectionError):
                writer.write(b"x")
                writer.write_eof()
                data = await reader.read(-1)
            writer.close()
        assert [message for _, message, _ in log.lines] == ["accept failed"] * 2


async def test_a_debugging_port_survives_a_lack_of_descriptors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, served, failures = asyncio.get_running_loop(), asyncio.Event(), iter([errno.EMFILE])
    sock_accept = loop.sock_accept

    async def failing(listener: socket.socket) -> Any:
        for number in failures:
            raise OSError(number, os.strerror(number))
        return await sock_accept(listener)

    async def serve(_: socket.socket) -> None:
        served.set()

    monkeypatch.setattr(loop, "sock_accept", failing)
    port = asyncio.ensure_future(VsockListener(listen(f"unix:{tmp_path}/port"), serve, Log("error")).run())
    _, writer = await asyncio.open_unix_connection(tmp_path / "port")
    await asyncio.wait([port, asyncio.ensure_future(served.wait())], return_when=asyncio.FIRST_COMPLETED)
    assert served.is_set()
    writer.close()
    port.cancel()
    await asyncio.gather(port, return_exceptions=True)
