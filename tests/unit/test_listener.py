"""Who may connect, and what of it arrives."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import os
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from agent.listener import AddressError, Relay, _Side, listen

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


class Lines:
    """A log to look into."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str, dict[str, object]]] = []
        self.said = asyncio.Event()

    def __call__(self, level: str, message: str, **fields: object) -> None:
        self.lines.append((level, message, fields))
        self.said.set()


def run(work: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(work, 30))


@contextlib.asynccontextmanager
async def relay(directory: Path, target: Callable[..., Any]) -> AsyncIterator[tuple[Path, Lines]]:
    """A relay in front of a server; its address and its log.  No descriptor is left."""
    before = len(list(Path("/proc/self/fd").iterdir()))
    server = await asyncio.start_unix_server(target, directory / "target")
    listener, log = listen(f"unix:{directory / 'front'}"), Lines()
    task = asyncio.ensure_future(Relay(listener, str(directory / "target"), log).run())  # type: ignore[arg-type]
    yield directory / "front", log
    task.cancel()
    await asyncio.wait([task])
    listener.close()
    server.close()
    await server.wait_closed()
    for _ in range(1000):
        if len(list(Path("/proc/self/fd").iterdir())) == before:
            break
        await asyncio.sleep(0.005)
    assert len(list(Path("/proc/self/fd").iterdir())) == before


async def echo(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while data := await reader.read(1 << 16):
        writer.write(data)
        await writer.drain()
    writer.close()


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
def test_what_is_no_address(address: str) -> None:
    with pytest.raises(AddressError, match=r"is no address|cannot listen on"):
        listen(address).close()


def test_an_address_that_is_taken(tmp_path: Path) -> None:
    first = listen(f"unix:{tmp_path / 's'}")
    with pytest.raises(AddressError, match="already in use"):
        listen(f"unix:{tmp_path / 's'}")
    first.close()


def test_bytes_go_both_ways_and_each_way_ends_by_itself(tmp_path: Path) -> None:
    data = PREFACE + os.urandom(3_000_000)

    async def work() -> None:
        async with relay(tmp_path, echo) as (front, _):
            reader, writer = await asyncio.open_unix_connection(front)

            async def send() -> None:
                writer.write(data)
                await writer.drain()
                writer.write_eof()

            sending = asyncio.ensure_future(send())
            assert await reader.read(-1) == data  # after our own end
            await sending
            writer.close()

    run(work())


@pytest.mark.parametrize("ended", [False, True])
def test_what_comes_before_there_is_another_side_is_kept(ended: bool) -> None:
    async def work() -> None:
        loop = asyncio.get_running_loop()
        buffer = memoryview(bytearray(64))
        ends, sides = [], []
        for _ in range(2):
            ours, theirs = socket.socketpair()
            ends.append(ours)
            ours.setblocking(False)
            await loop.sock_sendall(ours, b"early")
            if ended:
                ours.shutdown(socket.SHUT_WR)
            _, side = await loop.connect_accepted_socket(lambda: _Side(buffer), theirs)
            sides.append(side)
        while not all(side._early and side._done is ended for side in sides):  # noqa: ASYNC110 - nothing announces it
            await asyncio.sleep(0)
        _Side.join(*sides)
        for end in ends:
            if not ended:
                await loop.sock_sendall(end, b" and late")
                end.shutdown(socket.SHUT_WR)
        for end in ends:
            whole = b""
            while data := await loop.sock_recv(end, 64):
                whole += data
            assert whole == (b"early" if ended else b"early and late")
            end.close()

    run(work())


def test_who_does_not_read_slows_who_writes(tmp_path: Path) -> None:
    sent = 0

    async def flood(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal sent
        with contextlib.suppress(ConnectionError):
            while True:
                writer.write(bytes(1 << 16))
                await writer.drain()
                sent += 1 << 16

    async def work() -> None:
        async with relay(tmp_path, flood) as (front, _):
            with socket.socket(socket.AF_UNIX) as client:
                client.setblocking(False)
                loop = asyncio.get_running_loop()
                await loop.sock_connect(client, str(front))
                await loop.sock_sendall(client, PREFACE)
                last = -1
                while sent != last:  # until it stands still
                    last = sent
                    await asyncio.sleep(0.1)
                assert 0 < sent < 4_000_000
                received = 0
                while received < 20_000_000:  # and goes on when we read
                    received += len(await loop.sock_recv(client, 1 << 20))

    run(work())


@pytest.mark.parametrize("first", [b"\0", b"G", b"\x16\x03\x01"], ids=["ttrpc", "http1", "tls"])
def test_other_protocols_are_closed_with_a_word(tmp_path: Path, first: bytes) -> None:
    async def work() -> None:
        async with relay(tmp_path, echo) as (front, log):
            reader, writer = await asyncio.open_unix_connection(front)
            writer.write(first)
            with contextlib.suppress(ConnectionResetError):  # what was sent is left unread
                assert await reader.read(-1) == b""
            writer.close()
            ((level, message, fields),) = log.lines
            assert (level, fields) == ("warning", {"first_byte": first[0]})
            assert "does not speak gRPC" in message

    run(work())


def test_connections_that_say_nothing_or_break_off_leave_nothing(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, echo) as (front, log):
            for opening in (b"", PREFACE[:1], PREFACE):
                for _ in range(20):
                    _, writer = await asyncio.open_unix_connection(front)
                    writer.write(opening)
                    await asyncio.sleep(0)
                    writer.transport.abort()
            assert log.lines == []

    run(work())


def test_a_server_that_is_not_there_closes_the_connection(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, echo) as (front, log):
            (tmp_path / "target").unlink()
            reader, writer = await asyncio.open_unix_connection(front)
            writer.write(PREFACE)
            with contextlib.suppress(ConnectionResetError):  # what was sent is left unread
                assert await reader.read(-1) == b""
            writer.close()
            assert log.lines[0][1] == "a connection could not be relayed"

    run(work())


@pytest.mark.parametrize(("cid", "welcome"), [(2, True), (1, False), (3, False), (0xFFFFFFFF, False)])
def test_on_vsock_only_the_host_is_welcome(cid: int, welcome: bool) -> None:
    class Connection:
        family = socket.AF_VSOCK
        closed = False

        def close(self) -> None:
            self.closed = True

    async def work() -> None:
        connection, log, joined = Connection(), Lines(), asyncio.Event()
        accepted: list[Connection] = []
        guest = Relay(socket.socket(), "/no/such/target", log)  # type: ignore[arg-type]

        async def accept(listener: socket.socket) -> tuple[Any, Any]:
            if accepted:
                await asyncio.Event().wait()
            accepted.append(connection)
            return connection, (cid, 1234)

        async def join(connection: Any) -> None:
            joined.set()

        guest._join = join  # type: ignore[method-assign]
        asyncio.get_running_loop().sock_accept = accept  # type: ignore[assignment, method-assign]
        task = asyncio.ensure_future(guest.run())
        await asyncio.wait([asyncio.ensure_future(joined.wait() if welcome else log.said.wait())])
        assert (joined.is_set(), connection.closed) == (welcome, not welcome)
        if not welcome:
            assert log.lines == [("warning", "refused a connection that is not the host's", {"cid": cid})]
        task.cancel()
        guest._listener.close()

    run(work())


def test_a_lack_of_descriptors_passes(tmp_path: Path) -> None:
    async def work() -> None:
        async with relay(tmp_path, echo) as (front, log):
            loop, failures = asyncio.get_running_loop(), 2
            accept = loop.sock_accept

            async def failing(listener: socket.socket) -> Any:
                nonlocal failures
                connection = await accept(listener)
                if failures:
                    failures -= 1
                    connection[0].close()
                    raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
                return connection

            loop.sock_accept = failing  # type: ignore[assignment, method-assign]
            data = b""
            while failures or data != PREFACE:
                reader, writer = await asyncio.open_unix_connection(front)
                with contextlib.suppress(ConnectionError):
                    writer.write(PREFACE)
                    writer.write_eof()
                    data = await reader.read(-1)
                writer.close()
            assert [message for _, message, _ in log.lines] == ["accept failed"] * 2

    run(work())
