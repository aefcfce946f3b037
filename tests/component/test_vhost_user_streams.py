"""Test streams through the vhost-user vsock device with a well-behaved guest: data and shutdown, both ways."""

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

LAYOUTS = ("two", "one", "indirect")


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starter(tmp_path) as start:
        yield start


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
