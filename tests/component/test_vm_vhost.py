"""Test the kernel's vsock: choosing a context id, and the relay between Unix sockets and a guest's ports.

This machine need not have vhost-vsock: the guest is a Unix socket here, reached by a test dialler.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import socket
import struct
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import pytest

from caisson.image.vm.errors import VMError
from caisson.image.vm.vsock import backend as vsock
from caisson.image.vm.vsock import relay

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Guest = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


class Kernel:
    """Plays the ioctl: the first ``busy`` ids are taken."""

    def __init__(self, busy: int = 0, failure: int = errno.EADDRINUSE) -> None:
        self.asked: list[int] = []
        self._busy = busy
        self._failure = failure

    def __call__(self, descriptor: int, request: int, argument: bytes) -> int:
        assert request == vsock.VHOST_VSOCK_SET_GUEST_CID
        os.fstat(descriptor)
        self.asked.append(struct.unpack("=Q", argument)[0])
        if len(self.asked) <= self._busy:
            raise OSError(self._failure, "no")
        return 0


def test_an_id_that_is_taken_is_passed_over(tmp_path: Path) -> None:
    (tmp_path / "vhost").touch()
    kernel = Kernel(busy=3)
    descriptor, cid = vsock.open_vhost(tmp_path / "vhost", kernel)
    os.close(descriptor)
    assert len(kernel.asked) == 4
    assert cid == kernel.asked[-1]
    assert all(3 <= asked < 0x80000000 for asked in kernel.asked)


@pytest.mark.parametrize("failure", [errno.EADDRINUSE, errno.ENOTTY])
def test_no_id_is_an_error_that_leaves_nothing_open(tmp_path: Path, failure: int) -> None:
    (tmp_path / "vhost").touch()
    before = sorted(Path("/proc/self/fd").iterdir())
    with pytest.raises(VMError, match=r"no free guest CID|refuses a guest CID"):
        vsock.open_vhost(tmp_path / "vhost", Kernel(10**6, failure))
    assert sorted(Path("/proc/self/fd").iterdir()) == before
    with pytest.raises(VMError, match="cannot be opened"):
        vsock.open_vhost(tmp_path / "none")


@contextlib.asynccontextmanager
async def relayed(tmp_path: Path, guest: Guest, refusals: tuple[int, ...] = ()) -> AsyncIterator[list[int]]:
    """Run a relay to a guest whose ports all do the same; yield the ports that were dialled."""
    ports: list[int] = []
    pending = list(refusals)
    server = await asyncio.start_unix_server(guest, str(tmp_path / "guest"))

    async def dial(port: int) -> socket.socket:
        ports.append(port)
        if pending:
            raise OSError(pending.pop(0), "no")
        connection = socket.socket(socket.AF_UNIX)
        connection.setblocking(False)
        await asyncio.get_running_loop().sock_connect(connection, str(tmp_path / "guest"))
        return connection

    up = asyncio.Event()
    task = asyncio.create_task(relay.relay(str(tmp_path / "h"), {str(tmp_path / "a"): 1024}, dial, up.set))
    await up.wait()
    try:
        yield ports
    finally:
        task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await task
        server.close()
        assert not (tmp_path / "h").exists()
        assert not (tmp_path / "a").exists()


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.write(b"end")
    writer.close()


async def test_both_ways_with_half_close(tmp_path: Path) -> None:
    async def feed(writer: asyncio.StreamWriter, data: bytes) -> None:
        writer.write(data)
        await writer.drain()
        writer.write_eof()

    async with relayed(tmp_path, echo) as ports:
        for path in ("a", "h"):
            assert (tmp_path / path).stat().st_mode & 0o777 == 0o600
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "a"))
        sent = os.urandom(3_000_000)
        feeding = asyncio.create_task(feed(writer, sent))
        received = await reader.read(-1)
        await feeding
        assert hashlib.sha256(received).digest() == hashlib.sha256(sent + b"end").digest()
        writer.close()
        assert ports == [1024]


async def test_the_handshake_takes_no_byte_beyond_its_line(tmp_path: Path) -> None:
    async with relayed(tmp_path, echo) as ports:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "h"))
        writer.write(b"connect 77\npipelined")
        writer.write_eof()
        assert await reader.read(-1) == b"OK 77\npipelinedend"
        writer.close()
        assert ports == [77]


@pytest.mark.parametrize(
    "line",
    [b"CONNECT\n", b"CONNECT x\n", b"CONNECT -1\n", b"CONNECT 4294967295\n", b"GET / HTTP/1.1\r\n", b"C" * 99, b""],
)
async def test_other_handshakes_are_hung_up_on(tmp_path: Path, line: bytes) -> None:
    async with relayed(tmp_path, echo) as ports:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "h"))
        writer.write(line)
        if not line:
            writer.write_eof()
        with contextlib.suppress(ConnectionError):
            assert await reader.read(-1) == b""
        writer.close()
        assert ports == []


async def test_a_client_waits_for_the_guest(tmp_path: Path) -> None:
    async with relayed(tmp_path, echo, (errno.ENODEV, errno.ETIMEDOUT)) as ports:
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "a"))
        writer.write(b"early")
        writer.write_eof()
        assert await reader.read(-1) == b"earlyend"
        writer.close()
        assert ports == [1024] * 3


async def test_relay_stops_dialling_for_a_client_that_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "RETRY_INTERVAL", 0.01)

    async with relayed(tmp_path, echo, (errno.ENODEV,) * 10**5) as ports:
        _, writer = await asyncio.open_unix_connection(str(tmp_path / "a"))
        while not ports:  # noqa: ASYNC110 - the relay announces nothing
            await asyncio.sleep(0)
        writer.close()
        await asyncio.sleep(0.1)
        dialled = len(ports)
        await asyncio.sleep(0.3)
        assert len(ports) == dialled


async def test_a_port_where_nobody_listens_is_an_end(tmp_path: Path) -> None:
    async with relayed(tmp_path, echo, (errno.ECONNRESET,)):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "h"))
        writer.write(b"CONNECT 5\n")
        assert await reader.read(-1) == b""
        writer.close()


async def test_one_side_that_breaks_ends_the_other(tmp_path: Path) -> None:
    """A guest's reset reaches a client that only waits, and one that only sends."""

    async def breaks(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readexactly(1)
        writer.transport.abort()  # the rest of the data is unread: a reset

    async with relayed(tmp_path, breaks):
        reader, writer = await asyncio.open_unix_connection(str(tmp_path / "a"))
        writer.write(b"x" * 100_000)
        with contextlib.suppress(ConnectionError):
            assert await reader.read(-1) == b""
        with pytest.raises(ConnectionError):
            while True:
                writer.write(b"x" * 100_000)
                await writer.drain()
        writer.close()


async def test_guest_connects_to_ports_of_the_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A host port is a Unix socket here; another VM has it at first."""
    monkeypatch.setattr(relay, "SCAN_INTERVAL", 0.01)
    busy, ours = [True], [True]

    def bind(port: int) -> socket.socket:
        if busy[0]:
            raise OSError(errno.EADDRINUSE, "no")
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(str(tmp_path / f"port-{port}"))
        return listener

    async def connected() -> Streams:
        while True:
            with contextlib.suppress(OSError):
                return await asyncio.open_unix_connection(str(tmp_path / "port-5000"))
            await asyncio.sleep(0.01)

    async def exchange() -> bytes:
        reader, writer = await connected()
        writer.write(b"from the guest")
        with contextlib.suppress(OSError):
            writer.write_eof()
        try:
            return await reader.read(-1)
        except ConnectionError:
            return b""
        finally:
            writer.close()

    (tmp_path / "h_other").touch()
    async with await asyncio.start_unix_server(echo, str(tmp_path / "h_5000")):
        task = asyncio.create_task(
            relay.serve_host_ports(str(tmp_path / "h"), relay.HostPorts(bind, lambda _: ours[0]))
        )
        waiting = asyncio.create_task(exchange())
        done, _ = await asyncio.wait([waiting], timeout=0.1)
        assert not done
        busy[0] = False
        assert await waiting == b"from the guestend"
        ours[0] = False
        assert await exchange() == b""
        ours[0] = True
    (tmp_path / "h_5000").unlink(missing_ok=True)
    while True:  # nobody listens there any more, so the port is free for others
        try:
            _, writer = await asyncio.open_unix_connection(str(tmp_path / "port-5000"))
        except ConnectionRefusedError:
            break
        writer.close()
        await asyncio.sleep(0.01)
    task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await task


def test_the_program_serves_and_cleans_up(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    script = str(Path(relay.__file__))
    words = [sys.executable, "-I", "-S", script, "--cid", "1234567", "--socket", str(tmp_path / "h")]
    with subprocess.Popen(
        [*words, "--raw", f"{tmp_path / 'a'}=1024", "--ready-fd", str(writing)], pass_fds=[writing]
    ) as program:
        os.close(writing)
        with os.fdopen(reading, "rb") as ready:
            assert ready.read() == b"\n"
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(tmp_path / "h"))
        program.terminate()
        assert program.wait(30) == 0
    assert list(tmp_path.iterdir()) == []
