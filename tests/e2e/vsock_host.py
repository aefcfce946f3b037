"""Implement the host's end of streams to and from ``tests/guest/peer.c``: what to send, and what to expect."""

from __future__ import annotations

import contextlib
import random
import selectors
import socket
import struct
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from tests.e2e.conftest import ROOT, Caisson
from tests.shim.engine import rootfs

REQUEST = struct.Struct("<IIIIQQQ")
ECHO, SINK, SOURCE, LOAD = 1, 2, 3, 4
SLOW, SHUT_READING = 1, 2
BLOCK = 65521
#: Bytes read or written at once.
PIECE = 1 << 17


def compile_peer(directory: Path) -> Path:
    """Compile the guest's program, for any guest of this machine's architecture."""
    program = directory / "peer"
    command = ["musl-gcc", "-O2", "-static", "-Wall", "-Wextra", "-Werror", "-o"]
    subprocess.run([*command, program, ROOT / "tests/guest/peer.c"], check=True)
    return program


def start_peer(caisson: Caisson, name: str, program: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Copy the program to a container of a VM, and run it there; its lines arrive on ``stdout``."""
    script = f"head -c {program.stat().st_size} >/tmp/peer; chmod +x /tmp/peer; exec /tmp/peer {' '.join(arguments)}"
    root = program.with_name("root.tar")
    root.write_bytes(rootfs())
    # The default filter denies vsock, as Docker's does.
    words = ("run", "--privileged", "--name", name, str(root), "--", "sh", "-c", script)
    with program.open("rb") as binary:
        return caisson.start(*words, stdin=binary, stdout=subprocess.PIPE)


def dial(path: Path, port: int, timeout: float = 60) -> socket.socket:
    """Connect to a port of a guest with the hybrid handshake; wait while nobody listens there."""
    deadline = time.monotonic() + timeout
    while True:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        with contextlib.suppress(ConnectionError):
            sock.connect(str(path))
            sock.sendall(b"CONNECT %d\n" % port)
            answer = b""
            while not answer.endswith(b"\n"):
                byte = sock.recv(1)
                if not byte:
                    break
                answer += byte
            else:
                return sock
        sock.close()
        assert time.monotonic() < deadline, f"nobody listens on the guest's port {port}"
        time.sleep(0.05)


class Kind(Enum):
    """How a stream ends."""

    WHOLE = "both ends send all and half-close"
    GUEST_LEAVES = "the guest hangs up in the middle"
    HOST_LEAVES = "the host hangs up in the middle"
    GUEST_IS_DEAF = "the guest stops reading in the middle, and sends the rest"
    HOST_IS_DEAF = "the host stops reading in the middle"


@dataclass(frozen=True)
class Plan:
    """What happens on a connection: bytes to and from the guest, and after which of the latter it happens."""

    number: int
    kind: Kind
    down: int
    up: int
    limit: int
    guest_is_slow: bool
    host_is_slow: bool

    @classmethod
    def random(cls, number: int, size: int, chance: random.Random) -> Plan:
        """Return a random plan, with ``size`` bytes each way on average."""
        kind = chance.choices(list(Kind), (55, 14, 14, 9, 8))[0]
        down, up = (chance.choice([0, 1, size // 2, size, size, 2 * size]) for _ in range(2))
        if kind is not Kind.WHOLE:
            down, up = down + 1, up + 1
        limit = chance.randrange(up if kind in (Kind.HOST_LEAVES, Kind.HOST_IS_DEAF) else max(1, down)) + 1
        return cls(number, kind, down, up, limit, chance.random() < 0.05, chance.random() < 0.2)

    def request(self) -> bytes:
        limit = self.limit if self.kind in (Kind.GUEST_LEAVES, Kind.GUEST_IS_DEAF) else 2**64 - 1
        flags = SLOW * self.guest_is_slow | SHUT_READING * (self.kind is Kind.GUEST_IS_DEAF)
        return REQUEST.pack(LOAD, self.number, flags, 0, self.down, self.up, limit)


def pattern() -> bytes:
    """Return the part common to all blocks of all streams, after their first eight bytes."""
    state, made = 1, bytearray()
    for _ in range(BLOCK):
        state = (state * 1664525 + 1013904223) & 0xFFFFFFFF
        made.append(state >> 24)
    return bytes(made)


class Streams:
    """The bytes of streams, by connection number and position."""

    def __init__(self) -> None:
        self._common = memoryview(pattern())

    def pieces(self, number: int, position: int, size: int) -> Iterator[bytes | memoryview]:
        while size:
            block, offset = divmod(position, BLOCK)
            piece = struct.pack("<II", number, block)[offset:] if offset < 8 else self._common[offset:]
            piece = piece[:size]
            yield piece
            position += len(piece)
            size -= len(piece)

    def bytes(self, number: int, position: int, size: int) -> bytes:
        return b"".join(self.pieces(number, position, size))


class Connection:
    """The host's end of one planned connection.  A slow one reads nothing until it is told to ``hurry``."""

    def __init__(self, plan: Plan, sock: socket.socket, streams: Streams, selector: selectors.BaseSelector) -> None:
        self.plan = plan
        self.sent = self.received = 0
        self.done = False
        self.wrong = ""
        self._streams = streams
        self._selector = selector
        self._sock = sock
        self._stalled = plan.host_is_slow
        self._reading = self._writing = True
        sock.sendall(plan.request())
        sock.setblocking(False)
        self._watched = 0
        self._watch()

    def ready(self, mask: int) -> None:
        if mask & selectors.EVENT_READ:
            self._read()
        if mask & selectors.EVENT_WRITE and self._writing:
            self._write()
        self._watch()

    def hurry(self) -> None:
        self._stalled = False
        self._watch()

    def close(self) -> None:
        self._writing = self._reading = False
        self._watch()

    def _read(self) -> None:
        try:
            data = self._sock.recv(PIECE)
        except ConnectionError:
            data = b""
        if not data:
            self._reading = False
            return
        if data != self._streams.bytes(self.plan.number, self.received, len(data)):
            self.wrong = f"not the bytes of the stream behind byte {self.received}"
            self.close()
            return
        self.received += len(data)
        if self.received >= self.plan.limit:
            if self.plan.kind is Kind.HOST_LEAVES:
                self._reading = self._writing = False
            elif self.plan.kind is Kind.HOST_IS_DEAF:
                self._sock.shutdown(socket.SHUT_RD)
                self._reading = False

    def _write(self) -> None:
        left = self.plan.down - self.sent
        try:
            if left:
                self.sent += self._sock.send(self._streams.bytes(self.plan.number, self.sent, min(left, PIECE)))
            if self.sent == self.plan.down:
                self._writing = False
                self._sock.shutdown(socket.SHUT_WR)
        except BlockingIOError:
            pass
        except ConnectionError:
            self._writing = False

    def _watch(self) -> None:
        reading = self._reading and not self._stalled
        wanted = selectors.EVENT_READ * reading | selectors.EVENT_WRITE * self._writing
        if wanted == self._watched:
            return
        if self._watched:
            self._selector.unregister(self._sock)
        self._watched = wanted
        if wanted:
            self._selector.register(self._sock, wanted, self)
        elif not self._stalled or not self._reading:
            self.done = True
            self._sock.close()

    def verdict(self, line: str) -> str:
        """Return what is wrong with the outcome, given the guest's ``received sent state``; empty if nothing is."""
        plan = self.plan
        got, put, state = line.split()
        down, up = int(got), int(put)
        if self.wrong or state == "wrong":
            return self.wrong or "the guest got other bytes than were sent"
        if plan.kind is Kind.WHOLE:
            good = (down, up, state, self.received) == (plan.down, plan.up, "whole", plan.up)
        elif plan.kind is Kind.GUEST_LEAVES:
            good = state == "left" and plan.limit <= down <= self.sent and self.received <= up
        elif plan.kind is Kind.GUEST_IS_DEAF:
            good = plan.limit <= down and (up, self.received) == (plan.up, plan.up)
        else:
            good = plan.limit <= self.received <= up and down <= self.sent
        return "" if good else f"the host sent {self.sent} and got {self.received}, the guest says {line}"
