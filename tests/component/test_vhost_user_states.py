"""Put the vhost-user vsock device through random states that no driver would create, beside connections that keep
working.

100,000 states take 40 s on an idle machine.
"""

from __future__ import annotations

import contextlib
import os
import random
import re
import select
import socket
import struct
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from caisson.image.vm.vsock.vhost_user import protocol as p
from tests.component.fake_guest import Guest, Start, starter
from tests.component.hostile_guest import PORT, Hostile
from tests.component.vhost_device import Backend
from tests.support import fuzz

#: Rounds of 500 states each at every change.
ROUNDS = 40 if "CI" in os.environ else 10

#: All messages the device may log; any other is a case that nobody thought of.
COMPLAINTS = re.compile(
    r"vsock 42: (the guest broke its (rx|tx) ring, the device is off until the guest restarts it: (rx|tx): .*"
    r"|the guest broke a connection, its port \d+ to port \d+: .*"
    r"|the guest sent a packet (from CID \d+ to CID \d+|shorter than its header)"
    r"|the guest has too many connections: one to port \d+ refused"
    r"|QEMU's request \d+ failed: .*)"
)
#: KiB of private memory of the device; seconds of CPU time per state, at most.
MEMORY = 24 << 10
TIME = 0.01


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starter(tmp_path) as start:
        yield start


class Program:
    """A host program that the guest may connect to: reads, replies, hangs up."""

    def __init__(self, backend: Backend) -> None:
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(f"{backend.hybrid}_{PORT}")
        self._listener.listen(64)
        self._listener.setblocking(False)
        self._socks: list[socket.socket] = []

    def work(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                break
            with contextlib.suppress(OSError):  # the guest has already broken it
                sock.send(b"hello")
            self._socks.append(sock)
        while len(self._socks) > 8:
            self._socks.pop(0).close()

    def close(self) -> None:
        for sock in (*self._socks, self._listener):
            sock.close()


def unknown_complaints(backend: Backend) -> list[str]:
    return [line for line in backend.lines().splitlines() if not COMPLAINTS.fullmatch(line)]


def call(sock: socket.socket, backend: Backend) -> None:
    with contextlib.suppress(BrokenPipeError):  # one ring is already broken
        sock.connect(backend.raw)
        sock.send(bytes(1000))


def packets(backend: Backend, guest: Guest, hostile: Hostile, program: Program, count: int) -> None:
    """Send random packets, beside an honest connection that does not notice."""
    guest.reboot()
    guest.listen()
    sock, stream = guest.pair()
    guest.handler = lambda header: header[3] != stream.port or header[2] != stream.host_port
    for number in range(count):
        hostile.packet((stream.port, stream.host_port))
        if number % 32 == 31:
            guest.process()
            program.work()
            guest.echo(sock, stream)
    guest.echo(sock, stream)
    guest.handler = None
    sock.close()


def rings(backend: Backend, guest: Guest, hostile: Hostile, program: Program, count: int) -> None:
    """Set up random rings; some with a program that wants to connect, some with other features."""
    guest.pause()
    features = hostile.chance.choice([-1, -1, ~p.F_EVENT_IDX, ~p.F_INDIRECT_DESC, p.F_VERSION_1])
    guest.tell(p.SET_FEATURES, struct.pack("<Q", guest.features & features | p.F_PROTOCOL_FEATURES))
    hostile.share_memory()
    for number in (0, 1):
        guest.tell(p.SET_VRING_ENABLE, struct.pack("<II", number, 1))
    for number in range(count):
        if number % 8 == 0:
            with socket.socket(socket.AF_UNIX) as sock:
                hostile.ring_state(partial(call, sock, backend))
        else:
            hostile.ring_state()
        if number % 32 == 0:
            program.work()
    assert hostile.intact()


def requests(backend: Backend, guest: Guest, hostile: Hostile, program: Program, count: int) -> None:
    """Send random requests on the control socket."""
    for _ in range(count):
        hostile.request()
    guest.tell(p.SET_PROTOCOL_FEATURES, struct.pack("<Q", guest.ask_u64(p.GET_PROTOCOL_FEATURES)))
    assert len(list(Path(f"/proc/{backend.process.pid}/fd").iterdir())) < 60, "received descriptors must be closed"


@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT)
def test_very_many_states(start: Start) -> None:
    backend, guest = start(log_burst=1e9, response_timeout=0.5, close_timeout=0.5)
    hostile = Hostile(guest, random.Random())
    program = Program(backend)
    for one in fuzz.rounds(ROUNDS):
        with one as hostile.chance:
            before = backend.cpu()
            for kind, count in ((packets, 200), (rings, 250), (requests, 50)):
                kind(backend, guest, hostile, program, count)
                assert backend.process.poll() is None
            used = backend.cpu() - before
            assert used < 500 * TIME, f"{used} s of CPU time for 500 states"
            assert backend.rss() < MEMORY
    assert unknown_complaints(backend) == []
    guest.reboot()
    guest.listen()
    sock, stream = guest.pair()
    guest.echo(sock, stream)
    before = backend.cpu()
    assert select.select([sock], [], [], 0.5)[0] == []
    assert backend.cpu() - before < 0.05, "an idle device must use no CPU time"
    hostile.close()
    program.close()
    sock.close()
