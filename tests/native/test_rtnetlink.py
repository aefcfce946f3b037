"""Test rtnetlink: answers from the kernel, and answers that are forged or truncated."""

from __future__ import annotations

import random
import socket
import struct
from typing import Any

import pytest

from caisson.agent.base import rtnetlink
from caisson.agent.base.rtnetlink import GETADDR, GETLINK, GETROUTE, IFLA_IFNAME, Rtnetlink
from tests.support import fuzz

pytestmark = pytest.mark.root

HEADER = struct.Struct("=IHHII")
EPERM = 1


class Recorded:
    """A socket that returns prepared data, then EOF."""

    def __init__(self, *answers: bytes) -> None:
        self._answers = list(answers)

    def send(self, data: bytes) -> None:
        pass

    def recvfrom(self, size: int) -> tuple[bytes, tuple[int, int]]:
        if not self._answers:
            raise ConnectionResetError
        return self._answers.pop(0)[:size], (0, 0)


def speaking(sock: Any) -> Rtnetlink:
    kernel = Rtnetlink()
    kernel._socket, kernel._sequence = sock, 0
    return kernel


def recorded(kind: int) -> list[bytes]:
    """Return this kernel's answer to the first request of a connection."""
    found = []

    class Recorder(socket.socket):
        def recvfrom(self, *words: Any) -> Any:
            found.append(super().recvfrom(*words))
            return found[-1]

    with Recorder(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as sock:
        assert speaking(sock).dump(kind)
    return [data for data, _ in found]


def test_what_another_process_sends_is_no_answer() -> None:
    """A container with CAP_NET_ADMIN may share the agent's network namespace, and see its port in /proc/net/netlink."""
    with Rtnetlink() as kernel, socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE) as other:
        other.bind((0, 0))
        error = struct.pack("=i", -EPERM) + bytes(16)
        forged = HEADER.pack(HEADER.size + len(error), 2, 0, 1, 0) + error  # NLMSG_ERROR, of the first request
        other.sendto(forged, (kernel._socket.getsockname()[0], 0))
        assert "lo" in [link.text(IFLA_IFNAME) for link in kernel.dump(GETLINK)]


@pytest.mark.parametrize("kind", [2, 3, rtnetlink.NEWLINK], ids=["error", "done", "link"])
def test_a_message_that_is_too_short_is_an_error(kind: int) -> None:
    with pytest.raises(OSError, match="truncated"):
        speaking(Recorded(HEADER.pack(HEADER.size + 2, kind, 0, 1, 0) + bytes(4))).dump(GETLINK)


def tampered(data: bytes, chance: random.Random) -> bytes:
    made = bytearray(data)
    for _ in range(chance.randrange(1, 5)):
        at = chance.randrange(len(made))
        made[at : at + chance.choice([1, 2, 4])] = chance.choice(
            [b"\0", b"\xff", b"\x03\0", b"\xff\xff\xff\xff", chance.randbytes(2), b""]
        )
    return bytes(made[: chance.choice([len(made), len(made), chance.randrange(len(made) + 1)])])


@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT)
def test_tampered_answers_are_read_or_refused() -> None:
    answers = [(kind, recorded(kind)) for kind in (GETLINK, GETADDR, GETROUTE)]
    read, refused = 0, 0
    for one in fuzz.rounds(3000):
        with one as chance:
            kind, parts = chance.choice(answers)
            try:
                for message in speaking(Recorded(*[tampered(part, chance) for part in parts])).dump(kind):
                    assert all(isinstance(number, int) for number in message.fixed)
                    message.text(IFLA_IFNAME)
                    message.number(rtnetlink.IFLA_MTU)
                read += 1
            except OSError:
                refused += 1
    print(f"{read} answers read, {refused} refused")
    assert read and refused
