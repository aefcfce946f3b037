"""Test the vhost-user vsock device with a guest that tries to crash, stop or fill it, or to reach beyond its memory."""

from __future__ import annotations

import os
import random
import select
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from caisson.image.vm.vsock.vhost_user import packet
from caisson.image.vm.vsock.vhost_user import protocol as p
from tests.component.driver_ring import RING_SIZE
from tests.component.fake_guest import GUEST, Guest, Start, starter
from tests.component.vhost_device import CID, Backend

BASE = GUEST + 0x200000
NEXT, WRITE, INDIRECT = 1, 2, 4
MAX_PACKETS = 2000  # of 4 KiB: many times a stream's buffer


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starter(tmp_path) as start:
        yield start


def chain(*descriptors: tuple[int, int, int, int], head: int = 0) -> Callable[[Guest], None]:
    def write(guest: Guest) -> None:
        for index, descriptor in enumerate(descriptors):
            guest.tx.describe(index, *descriptor)
        guest.tx.offer(head)

    return write


def table(*descriptors: tuple[int, int, int, int], length: int = -1, flags: int = INDIRECT) -> Callable[[Guest], None]:
    def write(guest: Guest) -> None:
        for index, descriptor in enumerate(descriptors):
            struct.pack_into("<QIHH", guest.memory, BASE - GUEST + 16 * index, *descriptor)
        guest.tx.describe(0, BASE, 16 * len(descriptors) if length < 0 else length, flags)
        guest.tx.offer(0)

    return write


def run_away(guest: Guest) -> None:
    guest.tx.index += RING_SIZE
    guest.tx.offer(0, kick=False)
    os.eventfd_write(guest.tx.kick, 1)


BROKEN_RINGS: dict[str, Callable[[Guest], None]] = {
    "loop of one": chain((BASE, 44, NEXT, 0)),
    "loop of two": chain((BASE, 44, NEXT, 1), (BASE, 44, NEXT, 0)),
    "loop of nothing": chain((BASE, 0, NEXT, 0)),
    "head out of range": chain((BASE, 44, 0, 0), head=RING_SIZE),
    "next out of range": chain((BASE, 44, NEXT, 65535)),
    "address out of range": chain((GUEST - 1, 44, 0, 0)),
    "end out of range": chain((GUEST + (16 << 20) - 43, 44, 0, 0)),
    "address that wraps": chain((2**64 - 8, 44, 0, 0)),
    "4 GB": chain((BASE, 2**32 - 1, 0, 0)),
    "writable packet": chain((BASE, 44, WRITE, 0)),
    "avail runs away": run_away,
    "nested table": table((BASE, 16, INDIRECT, 0)),
    "table and next": table((BASE, 44, 0, 0), flags=INDIRECT | NEXT),
    "table of nothing": table((BASE, 44, 0, 0), length=0),
    "table of 17 bytes": table((BASE, 44, 0, 0), length=17),
    "table of 4 GB": table((BASE, 44, 0, 0), length=2**32 - 16),
    "table out of range": chain((GUEST + (16 << 20), 16, INDIRECT, 0)),
    "next behind the table": table((BASE, 44, NEXT, 1)),
    "loop in the table": table((BASE, 44, NEXT, 1), (BASE, 44, NEXT, 0)),
}

BROKEN_BUFFERS: dict[str, tuple[int, int, int, int]] = {
    "read-only": (BASE, 4096, 0, 0),
    "43 bytes": (BASE, 43, WRITE, 0),
    "no room for data": (BASE, 44, WRITE, 0),
    "nothing": (BASE, 0, WRITE, 0),
    "out of range": (1 << 63, 4096, WRITE, 0),
    "loop": (BASE, 16, WRITE | NEXT, 127),
}


def recovers(backend: Backend, guest: Guest, sock: socket.socket) -> None:
    """Check that the ring is stopped, with one log line, and that a restart of the guest recovers it."""
    assert guest.ended(sock)
    assert backend.lines().count("\n") == 1 and "broke its" in backend.lines()
    refused = backend.connect()
    assert refused.recv(1) == b"", "nobody should wait for a stopped device"
    guest.reboot()
    guest.listen()
    again, stream = guest.pair()
    guest.echo(again, stream)
    assert backend.lines().count("\n") == 1
    for each in (sock, refused, again):
        each.close()


@pytest.mark.parametrize("name", BROKEN_RINGS)
def test_broken_ring(start: Start, name: str) -> None:
    backend, guest = start()
    sock, _ = guest.pair()
    BROKEN_RINGS[name](guest)
    recovers(backend, guest, sock)


@pytest.mark.parametrize("name", BROKEN_BUFFERS)
def test_broken_receive_buffer(start: Start, name: str) -> None:
    backend, guest = start()
    sock, _ = guest.pair()
    for index in range(RING_SIZE):
        guest.rx.describe(index, *BROKEN_BUFFERS[name])
    sock.sendall(bytes(100_000))  # a buffer may have been taken before
    recovers(backend, guest, sock)


def test_indirect_needs_the_feature(start: Start) -> None:
    backend, guest = start(features=p.F_VERSION_1)
    sock, _ = guest.pair()
    table((BASE, 44, 0, 0))(guest)
    recovers(backend, guest, sock)


def header(op: int, stream_port: int, host_port: int, length: int = 0) -> bytes:
    return packet.HEADER.pack(CID, 2, stream_port, host_port, length, 1, op, 0, 1 << 18, 0)


def test_header_and_payload_in_pieces(start: Start) -> None:
    backend, guest = start()
    sock, stream = guest.pair()
    data = header(packet.RW, stream.port, stream.host_port, 40) + bytes(range(40)) + b"behind its length"
    guest.memory[0x200000 : 0x200000 + len(data)] = data
    for index in range(len(data)):
        more = index < len(data) - 1
        guest.tx.describe(index, BASE + index, 1, NEXT if more else 0, index + 1)
    guest.tx.offer(0)
    assert guest.host_receives(sock, 40) == bytes(range(40))
    # Normal descriptors before an indirect table, and an empty one: unusual, but allowed.
    struct.pack_into("<QIHH", guest.memory, 0x210000, BASE + 30, 14 + 5, 0, 0)
    guest.memory[0x200000:0x200031] = header(packet.RW, stream.port, stream.host_port, 5) + b"mixed"
    guest.tx.describe(0, BASE, 30, NEXT, 1)
    guest.tx.describe(1, BASE, 0, NEXT, 2)
    guest.tx.describe(2, BASE + 0x10000, 16, INDIRECT)
    guest.tx.offer(0)
    assert guest.host_receives(sock, 5) == b"mixed"
    sock.close()
    assert backend.lines() == ""


@pytest.mark.parametrize("size", [0, 1, 43])
def test_packet_shorter_than_its_header(start: Start, size: int) -> None:
    backend, guest = start()
    sock, stream = guest.pair()
    slot = guest.slots.popleft()
    guest.tx.describe(2 * slot, BASE, size, 0)
    guest.tx.offer(2 * slot)
    guest.until(lambda: slot in guest.slots)
    guest.echo(sock, stream)
    assert "shorter than its header" in backend.lines()
    sock.close()


def refusal(guest: Guest) -> tuple[int, ...]:
    guest.until(lambda: bool(guest.packets))
    answer = guest.packets.pop(0)
    assert answer[6] == packet.RST
    return answer


def test_packets_for_nobody(start: Start) -> None:
    backend, guest = start()
    sock, stream = guest.pair()
    for op in (0, packet.RESPONSE, packet.SHUTDOWN, packet.RW, packet.CREDIT_UPDATE, packet.CREDIT_REQUEST, 8, 65535):
        guest.packet(op, 600, 700)
        assert refusal(guest)[2:6] == (700, 600, 0, 1)
    guest.packet(packet.REQUEST, 600, 700, kind=2)
    assert refusal(guest)[5] == 2, "an RST must have the type of the refused packet"
    guest.packet(packet.RST, 600, 700)
    guest.packet(packet.REQUEST, 600, 700, cid=CID + 1)
    guest.packet(packet.REQUEST, 600, 700, to=1)
    guest.echo(sock, stream)
    assert not guest.packets, "an RST or a packet for another CID must not be answered"
    assert "packet from CID 43 to CID 2" in backend.lines()
    sock.close()


BROKEN_STREAMS: dict[str, Callable[[Guest, int, int], None]] = {
    "unknown operation": lambda guest, port, host: guest.packet(9, port, host),
    "operation 0": lambda guest, port, host: guest.packet(0, port, host),
    "second request": lambda guest, port, host: guest.packet(packet.REQUEST, port, host),
    "response to no request": lambda guest, port, host: guest.packet(packet.RESPONSE, port, host),
    "length that lies": lambda guest, port, host: guest.packet(packet.RW, port, host, b"x" * 10, length=11),
    "length of 4 GB": lambda guest, port, host: guest.packet(packet.RW, port, host, b"x", length=2**32 - 1),
    "more than its credit": lambda guest, port, host: guest.packet(packet.RW, port, host, bytes(65536)),
}


@pytest.mark.parametrize("name", BROKEN_STREAMS)
def test_broken_stream_is_reset_and_others_go_on(start: Start, name: str) -> None:
    backend, guest = start()
    sock, stream = guest.pair()
    victim, broken = guest.pair()
    BROKEN_STREAMS[name](guest, broken.port, broken.host_port)
    guest.until(lambda: broken.reset)
    assert guest.ended(victim)
    assert backend.lines().count("\n") == 1 and "broke a connection" in backend.lines()
    guest.echo(sock, stream)
    for each in (sock, victim):
        each.close()


def test_data_after_its_end(start: Start) -> None:
    _backend, guest = start()
    victim, broken = guest.pair()
    broken.shutdown(packet.SHUTDOWN_SEND)
    broken.packet(packet.RW, b"more")
    guest.until(lambda: broken.reset)
    assert guest.ended(victim)
    victim.close()


def test_ignored_credit_is_not_buffered(start: Start) -> None:
    backend, guest = start()
    sock, stream = guest.pair()
    victims = [guest.pair() for _ in range(20)]
    before = backend.rss()
    for _victim, broken in victims:
        for _ in range(MAX_PACKETS):
            guest.packet(packet.RW, broken.port, broken.host_port, bytes(4096))
            guest.process()
            if broken.reset:
                break
        assert broken.reset, "credit was exceeded"
    assert backend.rss() - before < 8 << 10
    guest.echo(sock, stream)
    for each in (sock, *(victim for victim, _ in victims)):
        each.close()


def test_credit_lies_do_not_stop_or_overrun_anything(start: Start) -> None:
    _, guest = start()
    sock, stream = guest.pair()
    liar_sock, liar = guest.pair()
    for window, forwarded in [(0, 0), (2**32 - 1, 2**32 - 1), (1, 5), (0, 2**31), (2**32 - 1, 0)]:
        guest.packet(packet.CREDIT_UPDATE, liar.port, liar.host_port, window=window, forwarded=forwarded)
        liar_sock.sendall(b"data")
        guest.echo(sock, stream)
    guest.until(lambda: len(liar.data) == 20)
    for each in (sock, liar_sock):
        each.close()


def test_refusals_do_not_pile_up(start: Start) -> None:
    backend, guest = start(pending_rsts=100)
    guest.feeding = False
    flood = 64 + 100 + 60
    for port in range(flood):
        guest.packet(packet.RW, port, 700)
    guest.settle()
    assert (guest.tx.index - guest.tx.used[1]) & 0xFFFF >= 50, "it should have stopped taking packets"
    before = backend.cpu()
    select.select([], [], [], 0.3)
    assert backend.cpu() - before < 0.05, "it should wait for buffers"
    guest.feed()
    guest.until(lambda: len(guest.packets) == flood)
    assert [each[3] for each in guest.packets] == list(range(flood))


def test_random_packets(start: Start) -> None:
    """Well-formed chains with garbage in them break at most their own connections."""
    backend, guest = start()
    chance = random.Random(1)
    sock, stream = guest.pair()
    server = backend.listen(7000, backlog=64)
    server.setblocking(False)
    guest.handler = lambda header: header[3] != stream.port or header[2] != stream.host_port
    for number in range(20_000):
        host_port, port = chance.choice([7000, 7001, 1 << 30, stream.host_port + 1]), chance.choice([1024, 5000, 5001])
        if (port, host_port) == (stream.port, stream.host_port):
            continue
        guest.packet(
            chance.choice([1, 1, 2, 3, 4, 5, 5, 5, 6, 7, chance.randrange(65536)]),
            port,
            host_port,
            bytes(chance.choice([0, 1, 100, 5000])),
            flags=chance.choice([0, 1, 2, 3, chance.randrange(2**32)]),
            window=chance.choice([0, 1, 2**18, 2**32 - 1]),
            forwarded=chance.choice([0, 5000, chance.randrange(2**32)]),
            cid=chance.choice([CID] * 20 + [2, 0, 2**64 - 1]),
            kind=chance.choice([1] * 20 + [0, 2, 65535]),
            length=chance.choice([-1] * 10 + [0, 1, 2**32 - 1]),
        )
        if number % 50 == 0:
            guest.process()
            guest.echo(sock, stream)
            for _ in range(20):
                try:
                    server.accept()[0].close()
                except BlockingIOError:
                    break
    guest.echo(sock, stream)
    assert backend.rss() < 32 << 10
    assert backend.lines().count("\n") < 100 and "internal" not in backend.lines()
    server.close()
    sock.close()


def scramble(guest: Guest, chance: random.Random) -> None:
    """Corrupt the rings at random: most numbers are near the limits of what is allowed."""
    addresses = [0, GUEST, BASE, BASE + 4096, GUEST + guest.size - 44, GUEST + guest.size, 2**64 - 1, GUEST + 0x10000]
    lengths = [0, 1, 16, 32, 43, 44, 45, 4096, 4140, 65536, guest.size, 2**31, 2**32 - 1]
    for ring in (guest.rx, guest.tx):
        good = WRITE if ring is guest.rx else 0
        for index in range(RING_SIZE):
            flags = chance.choice([good] * 12 + [good | NEXT] * 6 + [INDIRECT, 7, chance.randrange(65536)])
            following = chance.choice([index + 1, chance.randrange(RING_SIZE), chance.randrange(65536)]) & 0xFFFF
            sane = chance.random() < 0.9
            address = chance.choice(addresses[1:4] if sane else addresses)
            ring.describe(index, address, chance.choice(lengths[5:9] if sane else lengths), flags, following)
        for index in range(RING_SIZE):
            ring.avail[2 + index] = chance.choice([index, chance.randrange(RING_SIZE), chance.randrange(65536)])
        ring.avail[0] = chance.randrange(2)
        ring.avail[2 + RING_SIZE] = chance.randrange(65536)
    for offset in (0, 4096):
        struct.pack_into("<QIHH", guest.memory, BASE - GUEST + offset, chance.choice(addresses), 44, 0, 0)
        op = chance.randrange(9)
        guest.memory[BASE - GUEST + offset : BASE - GUEST + offset + 44] = header(
            op, 1024, 1 << 30, chance.randrange(99)
        )
    for ring in (guest.rx, guest.tx):
        ring.avail[1] = (
            ring.index + chance.choice([1, 2, 16, RING_SIZE, RING_SIZE + 1, chance.randrange(65536)])
        ) & 0xFFFF


def test_random_rings(start: Start, rounds: int = 400) -> None:
    backend, guest = start()
    chance = random.Random(2)
    outside = bytes(1 << 20)
    guest.memory[8 << 20 : 9 << 20] = outside
    for number in range(rounds):
        sock = backend.connect()
        sock.sendall(bytes(100))
        scramble(guest, chance)
        for ring in (guest.tx, guest.rx):
            os.eventfd_write(ring.kick, 1)
        guest.settle()
        sock.close()
        guest.reboot()
        guest.listen()
        if number % 20 == 0:
            sock, stream = guest.pair()
            guest.echo(sock, stream)
            sock.close()
    assert guest.memory[8 << 20 : 9 << 20] == outside
    assert backend.rss() < 32 << 10
    assert "internal" not in backend.lines()


def test_random_requests_on_the_control_socket(start: Start) -> None:
    """QEMU is not hostile, but its requests are checked just the same."""
    backend, guest = start()
    chance = random.Random(3)
    sock, _ = guest.pair()
    for _ in range(3000):
        request = chance.choice(
            [number for number in range(45) if number not in (p.GET_CONFIG, p.GET_PROTOCOL_FEATURES)]
        )
        payload = struct.pack("<II", chance.choice([0, 1, 2, 256, 2**32 - 1]), chance.choice([0, 1, 3, 128, 2**31]))
        payload += chance.randbytes(chance.choice([0, 0, 8, 32, 40, 400]))
        payload = payload[: chance.choice([0, 7, 8, len(payload)])]
        fds = [guest.memfd, guest.rx.kick, guest.tx.call][: chance.choice([0, 0, 1, 2, 3])]
        guest.tell(request, payload, tuple(fds))
        guest.tell(p.GET_PROTOCOL_FEATURES)
        while True:  # replies to requests that happened to be valid
            answer, _flags, size = struct.unpack("<III", guest.control.recv(12, socket.MSG_WAITALL))
            if size:
                guest.control.recv(size, socket.MSG_WAITALL)
            if answer == p.GET_PROTOCOL_FEATURES:
                break
    assert len(list(Path(f"/proc/{backend.process.pid}/fd").iterdir())) < 30, "received descriptors must be closed"
    guest.tell(p.SET_PROTOCOL_FEATURES, struct.pack("<Q", guest.ask_u64(p.GET_PROTOCOL_FEATURES)))
    guest.streams.clear()
    guest.reboot()
    guest.listen()
    assert guest.ended(sock)
    again, stream = guest.pair()
    guest.echo(again, stream)
    assert "internal" not in backend.lines()
    for each in (sock, again):
        each.close()
