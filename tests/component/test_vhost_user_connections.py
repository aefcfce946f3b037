"""Test how connections through the vhost-user vsock device are opened and refused, and how many may be open."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.image.vm.vsock.vhost_user import packet
from tests.component.fake_guest import Guest, Start, starter
from tests.component.vhost_device import AGENT, Backend


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starter(tmp_path) as start:
        yield start


def test_hybrid_handshake(start: Start) -> None:
    backend, guest = start()
    sock = backend.connect(backend.hybrid)
    sock.sendall(b"CONNECT 1024\npipelined")
    stream = guest.accept()
    answer = guest.host_receives(sock, 14)
    assert answer == b"OK %d\n" % stream.host_port
    guest.until(lambda: stream.data == b"pipelined")
    slow = backend.connect(backend.hybrid)
    for byte in b"connect 1024":  # as Kata's Rust shim writes it
        slow.send(bytes([byte]))
    # Its first bytes were read before another connection was served.
    guest.pair()[0].close()
    slow.send(b"\n")
    assert guest.host_receives(slow, 3) == b"OK "
    for each in (sock, slow):
        each.close()


@pytest.mark.parametrize(
    "line",
    [
        "CONNECT\n",
        "CONNECT x\n",
        "CONNECT -1\n",
        "connected 1024\n",
        "CONNECT 4294967295\n",
        "CONNECT 99999999999\n",
        "\n",
        "GET / HTTP/1.1\r\nHost: somewhere\r\n",
        "x" * 32,
    ],
)
def test_bad_handshakes_are_closed(start: Start, line: str) -> None:
    backend, guest = start()
    sock = backend.connect(backend.hybrid)
    sock.sendall(line.encode())
    try:
        assert sock.recv(10) == b""
    except ConnectionResetError:
        pass  # closed with our line unread
    assert not guest.streams
    sock.close()


def test_slow_handshake_is_closed(start: Start) -> None:
    backend, _guest = start(connect_timeout=0.2)
    sock = backend.connect(backend.hybrid)
    sock.sendall(b"CONNECT 10")
    with pytest.raises(ConnectionResetError):
        sock.recv(10)
    sock.close()


def test_closed_port_of_the_guest(start: Start) -> None:
    backend, guest = start()
    sock = backend.connect(backend.hybrid)
    sock.sendall(b"CONNECT 77\n")
    assert guest.ended(sock)
    sock.close()


def test_request_that_is_never_answered(start: Start) -> None:
    backend, guest = start(response_timeout=0.2)
    guest.handler = lambda header: header[6] == packet.REQUEST
    sock = backend.connect()
    assert guest.ended(sock)
    guest.until(lambda: bool(guest.packets))
    assert guest.packets[0][6] == packet.RST
    sock.close()


def test_guest_connects(start: Start) -> None:
    backend, guest = start()
    server = backend.listen(7000)
    stream = guest.connect(7000)
    assert stream.connected
    sock, _ = server.accept()
    stream.send(b"to the host")
    assert guest.host_receives(sock, 11) == b"to the host"
    sock.sendall(b"to the guest")
    sock.close()
    guest.until(lambda: stream.data == b"to the guest" and stream.peer_shut == packet.SHUTDOWN_BOTH)
    server.close()
    assert guest.connect(7000, 5001).reset, "connected, though nobody listens any more"
    assert guest.connect(7001, 5002).reset, "connected, though there never was a socket"


def test_program_that_leaves_before_the_guest_accepts(start: Start) -> None:
    backend, guest = start()
    guest.handler = lambda header: header[6] == packet.REQUEST
    backend.connect().close()
    guest.until(lambda: bool(guest.packets))
    assert guest.packets[0][6] == packet.RST


def test_200_connections_at_once(start: Start) -> None:
    backend, guest = start()
    socks = [backend.connect() for _ in range(200)]
    streams = [guest.accept() for _ in socks]
    for number, sock in enumerate(socks):
        sock.sendall(b"%d" % number)
    guest.until(lambda: all(stream.data for stream in streams))
    assert sorted(int(stream.data) for stream in streams) == list(range(200))
    for stream in streams:
        stream.send(bytes(stream.data) * 2)
    for number, sock in enumerate(socks):
        expected = b"%d" % number * 2
        assert guest.host_receives(sock, len(expected)) == expected
        sock.close()
    guest.until(lambda: not guest.streams)


def test_the_cap_on_connections_makes_the_next_one_wait(start: Start) -> None:
    backend, guest = start(connections=3)
    socks = [backend.connect() for _ in range(4)]
    guest.until(lambda: len(guest.accepted[AGENT]) == 3)
    streams = [guest.accept() for _ in range(3)]
    streams[0].shutdown(packet.SHUTDOWN_BOTH)
    guest.until(lambda: len(guest.accepted[AGENT]) == 1)
    for sock in socks:
        sock.close()


def test_guest_cannot_open_more_than_its_share(start: Start) -> None:
    backend, guest = start(from_guest=2)
    server = backend.listen(7000)
    streams = [guest.connect(7000, 5000 + number) for number in range(3)]
    assert [stream.reset for stream in streams] == [False, False, True]
    sock, _ = guest.pair()
    sock.close()
    server.close()


def test_full_backlog_refuses_the_guest(start: Start) -> None:
    backend, guest = start()
    server = backend.listen(7000, backlog=0)
    results = [guest.connect(7000, 5000 + number).reset for number in range(4)]
    assert results[0] is False and results[-1] is True
    server.close()


def test_connections_before_the_driver_wait_for_it(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    early, gone = backend.connect(), backend.connect()
    early.sendall(b"early")
    gone.close()
    guest = Guest(backend)
    guest.listen()
    stream = guest.accept()
    guest.until(lambda: stream.data == b"early")
    assert len(guest.streams) == 1
    early.close()
    backend.close()
    guest.close()
