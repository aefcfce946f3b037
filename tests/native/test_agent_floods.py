"""Test what a client can do to the agent through its protocols: floods, hoards and slow drips cost little, others
nothing.

Each peer is a plain socket with hand-written frames, so that it can send what no library sends.
"""

from __future__ import annotations

import socket
import statistics
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.native.agent_support import RunningAgent

pytestmark = pytest.mark.root

MIB = 1 << 20
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, GOAWAY, CONTINUATION = 0, 1, 2, 3, 4, 7, 9
END_STREAM, END_HEADERS = 1, 4

#: POST /grpc.Health/Check of gRPC, in HPACK: indexed fields, and literals without indexing.
BLOCK = (
    b"\x83\x86\x04\x12/grpc.Health/Check\x01\x05agent"  # :method, :scheme, :path, :authority
    b"\x0f\x10\x10application/grpc"  # content-type
)


def frame(kind: int, payload: bytes = b"", flags: int = 0, stream: int = 0) -> bytes:
    return struct.pack(">BHBBL", len(payload) >> 16, len(payload) & 0xFFFF, kind, flags, stream) + payload


def ttrpc_frame(kind: int, data: bytes, stream: int = 1) -> bytes:
    return struct.pack(">LLBB", len(data), stream, kind, 0) + data


class Peer:
    """An HTTP/2 client after the preface."""

    def __init__(self, agent: RunningAgent) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.settimeout(30)
        self.socket.connect(str(agent.socket))
        self.send(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", frame(SETTINGS))
        self._file = self.socket.makefile("rb")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        self.socket.close()

    def send(self, *data: bytes) -> None:
        self.socket.sendall(b"".join(data))

    def frames(self) -> Iterator[tuple[int, int, bytes]]:
        """Yield frames (type, stream, payload) until EOF."""
        try:
            while header := self._file.read(9):
                high, low, kind, _, stream = struct.unpack(">BHBBL", header)
                yield kind, stream, self._file.read(high << 16 | low)
        except ConnectionResetError:
            return

    def check(self, stream: int) -> float:
        """Return the seconds that a Health.Check takes."""
        began = time.monotonic()
        self.send(frame(HEADERS, BLOCK, END_HEADERS, stream), frame(DATA, bytes(5), END_STREAM, stream))
        answer = next(payload for kind, of, payload in self.frames() if (kind, of) == (DATA, stream))
        assert answer == b"\0\0\0\0\2\x08\1"
        return time.monotonic() - began


@contextmanager
def flooding(agent: RunningAgent, opening: bytes, block: bytes) -> Iterator[None]:
    """Make another client send the same block as fast as it is read."""
    stop = threading.Event()
    with socket.socket(socket.AF_UNIX) as client:
        client.settimeout(1)
        client.connect(str(agent.socket))
        client.sendall(opening)

        def flood() -> None:
            while not stop.is_set():
                try:
                    client.sendall(block)
                except TimeoutError:
                    return

        thread = threading.Thread(target=flood)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()


def test_a_hundred_unfinished_requests_are_not_hoarded(agent: RunningAgent) -> None:
    """A connection makes the agent buffer at most 64 MiB; beyond that its streams are closed, and others are served."""
    with Peer(agent) as hoarder, Peer(agent) as other:
        other.check(1)
        before, piece = agent.memory(), bytes(16384)
        for stream in range(1, 201, 2):
            hoarder.send(frame(HEADERS, BLOCK, END_HEADERS, stream))
            hoarder.send(*[frame(DATA, piece, 0, stream)] * 255)
        hoarder.check(201)
        grown = agent.memory() - before
        assert other.check(3) < 5
        assert grown < 100 * MIB, f"{grown >> 20} MiB for one connection"


def test_refused_streams_are_told_why(agent: RunningAgent) -> None:
    with Peer(agent) as hoarder:
        for stream in range(1, 51, 2):
            hoarder.send(frame(HEADERS, BLOCK, END_HEADERS, stream))
            hoarder.send(*[frame(DATA, bytes(16384), 0, stream)] * 255)
        reset = next(payload for kind, _, payload in hoarder.frames() if kind == RST_STREAM)
        assert reset == (0xB).to_bytes(4, "big")  # ENHANCE_YOUR_CALM


def test_a_byte_costs_the_same_however_many_came_before_it(agent: RunningAgent) -> None:
    def drip(before: int) -> float:
        with Peer(agent) as peer:
            peer.send(frame(HEADERS, BLOCK, END_HEADERS, 1))
            peer.send(*[frame(DATA, bytes(16384), 0, 1)] * (before >> 14))
            peer.check(3)
            began = time.monotonic()
            peer.send(frame(DATA, b"x", 0, 1) * 4000)
            peer.check(5)
            return time.monotonic() - began

    few, many = (min(drip(size) for _ in range(3)) for size in (16384, 3 * MIB))
    assert many < 4 * few, f"{few:.3f} s after 16 KiB, {many:.3f} s after 3 MiB"


@pytest.mark.parametrize(
    "flood",
    [
        frame(HEADERS, BLOCK, 0, 1) + frame(CONTINUATION, b"", 0, 1) * 10_000,
        frame(HEADERS, BLOCK, END_HEADERS, 1) + frame(DATA, b"", 0, 1) * 10_000,
        frame(SETTINGS, struct.pack(">HL", 4, 65536) * 100_000),
    ],
    ids=["CONTINUATION", "DATA", "SETTINGS"],
)
def test_frames_that_carry_nothing_are_counted(agent: RunningAgent, flood: bytes) -> None:
    with Peer(agent) as peer:
        peer.send(flood)
        closed = next(payload for kind, _, payload in peer.frames() if kind in (GOAWAY, RST_STREAM))
        assert (closed[4:8] or closed) == (0xB).to_bytes(4, "big")  # ENHANCE_YOUR_CALM


PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + frame(SETTINGS)


@pytest.mark.parametrize(
    ("opening", "flood"),
    [
        (PREFACE, frame(PRIORITY, bytes(5), 0, 1) * 20_000),
        (b"", ttrpc_frame(9, b"") * 20_000),
    ],
    ids=["http2", "ttrpc"],
)
def test_one_client_is_never_the_only_one_served(agent: RunningAgent, opening: bytes, flood: bytes) -> None:
    """During a flood of no-op frames, another client waits for a turn of a few frames, not of a whole buffer."""
    with Peer(agent) as other:
        other.check(1)
        with Peer(agent) as alone:
            alone.send(frame(PRIORITY, bytes(5), 0, 1) * 20_000)
            whole = alone.check(3)
        with flooding(agent, opening, flood):
            waits = [other.check(stream) for stream in range(3, 83, 2)][10:]  # the flood has started by then
        assert statistics.median(waits) < whole / 4, f"{waits} against {whole}"
