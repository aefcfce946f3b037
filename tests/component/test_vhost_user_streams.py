"""Test the vhost-user vsock device with a well-behaved guest: connections, data and shutdown in both directions."""

from __future__ import annotations

import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.image.vm.vsock.vhost_user import packet, protocol
from tests.component.fake_guest import Guest, Start, Stream, starter
from tests.component.vhost_device import AGENT, Backend

LAYOUTS = ("two", "one", "indirect")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starter(tmp_path) as start:
        yield start


def listener(backend: Backend, port: int, backlog: int = 16) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX)
    sock.bind(f"{backend.hybrid}_{port}")
    sock.listen(backlog)
    sock.settimeout(10)
    return sock


@pytest.mark.parametrize("layout", LAYOUTS)
def test_echo_and_half_close_from_the_host(start: Start, layout: str) -> None:
    backend, guest = start(layout=layout)
    sock, stream = guest.pair()
    sock.sendall(b"hello")
    guest.until(lambda: stream.data == b"hello")
    stream.send(b"world")
    assert guest.host_receives(sock, 5) == b"world"
    sock.shutdown(socket.SHUT_WR)
    guest.until(lambda: stream.peer_shut == packet.SHUTDOWN_SEND)
    stream.send(b"still there")
    assert guest.host_receives(sock, 11) == b"still there"
    sock.close()
    guest.until(lambda: stream.peer_shut == packet.SHUTDOWN_BOTH)
    assert backend.lines() == ""


def test_half_close_from_the_guest(start: Start) -> None:
    _backend, guest = start()
    sock, stream = guest.pair()
    stream.send(b"last words")
    stream.shutdown(packet.SHUTDOWN_SEND)
    assert guest.host_receives(sock, 100) == b"last words"
    sock.sendall(b"an answer")
    guest.until(lambda: stream.data == b"an answer")
    stream.shutdown(packet.SHUTDOWN_RCV)
    guest.until(lambda: stream.reset)
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")
    sock.close()


def test_guest_that_does_not_receive_gives_the_host_epipe(start: Start) -> None:
    _backend, guest = start()
    sock, stream = guest.pair()
    stream.shutdown(packet.SHUTDOWN_RCV)
    guest.until(lambda: stream.peer_shut == packet.SHUTDOWN_SEND)
    with pytest.raises(BrokenPipeError):
        sock.send(b"x")
    stream.send(b"one way")
    assert guest.host_receives(sock, 7) == b"one way"
    sock.close()
    guest.until(lambda: stream.peer_shut == packet.SHUTDOWN_BOTH)


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
    server = listener(backend, 7000)
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


def transfer_to_host(guest: Guest, stream: Stream, sock: socket.socket, size: int) -> None:
    block = os.urandom(1 << 20)
    digests = [hashlib.blake2b(), hashlib.blake2b()]

    def read() -> None:
        while data := sock.recv(1 << 18):
            digests[1].update(data)

    reader = threading.Thread(target=read)
    reader.start()
    for _ in range(size >> 20):
        digests[0].update(block)
        stream.send(block)
        guest.until(lambda: not stream.out)
    stream.shutdown(packet.SHUTDOWN_SEND)
    reader.join(20)
    assert digests[0].digest() == digests[1].digest()


def transfer_to_guest(guest: Guest, stream: Stream, sock: socket.socket, size: int) -> None:
    block = os.urandom(1 << 20)
    digests = [hashlib.blake2b(), hashlib.blake2b()]
    stream.keep = False
    stream.sink = digests[1].update

    def write() -> None:
        for _ in range(size >> 20):
            digests[0].update(block)
            sock.sendall(block)
        sock.shutdown(socket.SHUT_WR)

    writer = threading.Thread(target=write)
    writer.start()
    guest.until(lambda: stream.peer_shut == packet.SHUTDOWN_SEND, timeout=60)
    writer.join(20)
    assert stream.received == size
    assert digests[0].digest() == digests[1].digest()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_64_mb_each_way(start: Start, layout: str) -> None:
    backend, guest = start(layout=layout)
    sock, stream = guest.pair()
    transfer_to_guest(guest, stream, sock, 64 << 20)
    transfer_to_host(guest, stream, sock, 64 << 20)
    sock.close()
    assert backend.lines() == ""


def test_without_event_index_and_indirect(start: Start) -> None:
    _backend, guest = start(features=protocol.F_VERSION_1)
    sock, stream = guest.pair()
    transfer_to_guest(guest, stream, sock, 8 << 20)
    transfer_to_host(guest, stream, sock, 8 << 20)
    sock.close()


def test_slow_guest_reader_blocks_only_itself(start: Start) -> None:
    _backend, guest = start()
    slow, slow_stream = guest.pair()
    slow_stream.reading = False
    slow.setblocking(False)
    sent = 0

    def full() -> bool:
        nonlocal sent
        try:
            sent += slow.send(bytes(65536))
        except BlockingIOError:
            return slow_stream.received == slow_stream.window
        return False

    while not full():
        guest.process()
    sock, stream = guest.pair()
    sock.sendall(b"quick")
    guest.until(lambda: stream.data == b"quick")
    slow_stream.read()
    guest.until(lambda: slow_stream.received == sent)
    for each in (sock, slow):
        each.close()


def test_slow_host_reader_blocks_only_itself_and_memory_is_bounded(start: Start) -> None:
    backend, guest = start()
    before = backend.rss()
    slow = [guest.pair() for _ in range(100)]
    sizes = [2 << 20] * len(slow)
    payload = os.urandom(sizes[0])
    for _, stream in slow:
        stream.send(payload)
    sock, stream = guest.pair()
    stream.send(b"quick")
    assert guest.host_receives(sock, 5) == b"quick"
    assert backend.rss() - before < 24 << 10
    for each, each_stream in slow:
        assert guest.host_receives(each, len(payload)) == payload
        assert not each_stream.out
        each.close()
    sock.close()


@pytest.mark.parametrize("end", ["rst", "shutdown"])
def test_buffered_bytes_are_delivered_after_the_guest_closes(start: Start, end: str) -> None:
    _backend, guest = start()
    sock, stream = guest.pair()
    payload = os.urandom(300_000)
    stream.send(payload)
    # The host reads nothing: its socket's buffer fills, the rest is in the device.
    guest.until(lambda: not stream.out)
    if end == "rst":
        stream.packet(packet.RST)
    else:
        stream.shutdown(packet.SHUTDOWN_BOTH)
        guest.until(lambda: stream.reset)
    other, other_stream = guest.pair()
    other_stream.send(b"x")
    assert guest.host_receives(other, 1) == b"x"
    assert guest.host_receives(sock, len(payload) + 1) == payload
    for each in (sock, other):
        each.close()


def test_unconfirmed_close_ends_with_rst(start: Start) -> None:
    _backend, guest = start(close_timeout=0.2)
    sock, stream = guest.pair()
    stream.reading = False  # like a program that ignores its socket: no RST from the guest
    sock.close()
    guest.until(lambda: stream.peer_shut == packet.SHUTDOWN_BOTH)
    guest.until(lambda: stream.reset)


def send_and_leave(sock: socket.socket, data: bytes) -> None:
    sock.sendall(data)
    sock.close()


def test_data_of_a_host_program_that_left_is_delivered(start: Start) -> None:
    _backend, guest = start()
    sock, stream = guest.pair()
    stream.reading = False
    payload = os.urandom(300_000)
    writer = threading.Thread(target=send_and_leave, args=(sock, payload))
    writer.start()
    guest.until(lambda: stream.received == stream.window)
    stream.read()
    guest.until(lambda: stream.received == len(payload) and stream.peer_shut == packet.SHUTDOWN_BOTH)
    assert stream.data == payload
    writer.join(10)


def test_guest_that_never_reads_what_a_departed_program_sent(start: Start) -> None:
    _backend, guest = start(linger_timeout=0.2)
    sock, stream = guest.pair()
    stream.reading = False
    writer = threading.Thread(target=send_and_leave, args=(sock, bytes(300_000)))
    writer.start()
    guest.until(lambda: stream.reset)
    writer.join(10)


def test_guest_hears_that_the_host_program_left(start: Start) -> None:
    _backend, guest = start()
    sock, stream = guest.pair()
    sock.close()
    guest.until(lambda: stream.peer_shut == packet.SHUTDOWN_BOTH)
    assert not guest.streams


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
    server = listener(backend, 7000)
    streams = [guest.connect(7000, 5000 + number) for number in range(3)]
    assert [stream.reset for stream in streams] == [False, False, True]
    sock, _ = guest.pair()
    sock.close()
    server.close()


def test_full_backlog_refuses_the_guest(start: Start) -> None:
    backend, guest = start()
    server = listener(backend, 7000, backlog=0)
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


def test_no_packet_is_missed_between_looking_and_sleeping(start: Start) -> None:
    """The guest notifies only on request, and replies just when the device stops polling."""
    _backend, guest = start(busy_poll=0.0004)
    sock, stream = guest.pair()
    for number in range(1500):
        sock.send(b"?")
        guest.until(lambda: len(stream.data) == 1)
        stream.data.clear()
        until = time.perf_counter() + number % 600 * 1e-6
        while time.perf_counter() < until:
            pass
        stream.send(b"!")
        assert guest.host_receives(sock, 1) == b"!"
    sock.close()
