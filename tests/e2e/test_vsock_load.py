"""Run two guests with hundreds of connections both ways that end in every possible way: nothing is lost or stuck.

``CAISSON_VSOCK_MB`` is the total amount of data (2048 for the full run).
"""

from __future__ import annotations

import os
import random
import selectors
import socket
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import pytest

from caisson.image.vm.qmp import QMP
from tests.e2e.conftest import Caisson
from tests.e2e.vsock_host import Connection, Plan, Streams, compile_peer, dial, start_peer

pytestmark = [pytest.mark.root, pytest.mark.vm]

MEGABYTES = int(os.environ.get("CAISSON_VSOCK_MB", "96"))
SEED = int(os.environ.get("CAISSON_VSOCK_SEED", "6"))
#: Per guest, half of them opened by the host and half by the guest.
CONNECTIONS = 200
GUESTS = ("one", "two")
PORT = 2000
#: Maximum KiB of a device, without the guest's memory.
MEMORY = 64 << 10
#: Seconds without a byte anywhere after which the test counts as stuck.
STUCK = 60


def private_memory(pid: int) -> int:
    """Return the KiB of a process, without the guest's memory, which it shares."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))


class Guest:
    """A booted VM running the program, and the connections of both directions."""

    def __init__(self, caisson: Caisson, name: str, program: Path, ends: ExitStack) -> None:
        self.name = name
        self._hybrid = caisson.run_directory / name / "vsock.sock"
        self.device = caisson.info(name)["pids"]["vsock"]
        self._listener = ends.enter_context(socket.socket(socket.AF_UNIX))
        self._listener.bind(f"{self._hybrid}_{PORT}")
        self._listener.listen(CONNECTIONS)
        self._listener.settimeout(120)
        words = f"vsock:{PORT}", f"dial:{PORT}:{CONNECTIONS // 2}"
        self.peer = ends.enter_context(start_peer(caisson, name, program, *words))
        ends.callback(self.peer.terminate)
        self.connections: dict[int, Connection] = {}

    def connect(self, chance: random.Random, streams: Streams, selector: selectors.BaseSelector) -> None:
        size = (MEGABYTES << 20) // (len(GUESTS) * CONNECTIONS)  # each way; not all of it will be sent
        for number in range(CONNECTIONS):
            sock = self._listener.accept()[0] if number % 2 else dial(self._hybrid, PORT)
            plan = Plan.random(number, size, chance)
            self.connections[number] = Connection(plan, sock, streams, selector)

    def outcomes(self) -> dict[int, str]:
        """Return the guest's line for each connection."""
        assert self.peer.stdout is not None
        found = {}
        for _ in range(CONNECTIONS):
            number, _, line = self.peer.stdout.readline().decode().strip().partition(" ")
            found[int(number)] = line
        return found

    def surprises(self) -> dict[int, str]:
        """Return the connections with an unexpected outcome."""
        outcomes = self.outcomes()
        return {
            number: f"{connection.plan}: {verdict}"
            for number, connection in self.connections.items()
            if (verdict := connection.verdict(outcomes[number]))
        }


def move(guests: list[Guest], selector: selectors.BaseSelector, meanwhile: Callable[[], object] = lambda: None) -> int:
    """Transfer everything; return the most memory that a device used.  Raises AssertionError if stuck.

    ``meanwhile`` is called several times a second.
    """
    everything = [connection for guest in guests for connection in guest.connections.values()]
    most = 0
    slow = True
    looked = then = time.monotonic()
    while not all(connection.done for connection in everything):
        events = selector.select(STUCK)
        assert events, [connection.plan for connection in everything if not connection.done]
        for key, mask in events:
            key.data.ready(mask)
        now = time.monotonic()
        if slow and all(connection.done or connection.plan.host_is_slow for connection in everything):
            slow = False  # the others were not delayed
            for connection in everything:
                connection.hurry()
        if now - looked > 0.2:
            looked = now
            meanwhile()
            most = max(most, *(private_memory(guest.device) for guest in guests))
    moved = sum(connection.sent + connection.received for connection in everything)
    print(f"{moved >> 20} MB in {time.monotonic() - then:.1f} s, at most {most} KiB in a device")
    return most


@pytest.mark.timeout(1800)
def test_two_guests_with_200_connections_each(own: Caisson, tmp_path: Path) -> None:
    program = compile_peer(tmp_path)
    chance, streams = random.Random(SEED), Streams()
    with ExitStack() as ends:
        ends.callback(own, "stop-vm", "--all")
        boots = [own.start("boot-vm", "--name", name, "--detach", stderr=subprocess.DEVNULL) for name in GUESTS]
        assert [boot.wait(280) for boot in boots] == [0, 0]
        selector = ends.enter_context(selectors.DefaultSelector())
        guests = [Guest(own, name, program, ends) for name in GUESTS]
        for guest in guests:
            guest.connect(chance, streams, selector)
        most = move(guests, selector)
        assert [guest.surprises() for guest in guests] == [{}, {}], f"seed {SEED}"
        assert most < MEMORY
        assert own("exec", "--name", GUESTS[0], "--", "echo", "fine").stdout == b"fine\n"


def test_a_guest_that_is_paused_again_and_again(own: Caisson, tmp_path: Path) -> None:
    pauses = 0
    with ExitStack() as ends:
        ends.callback(own, "stop-vm", "--all")
        assert own("boot-vm", "--name", "one", "--detach").returncode == 0
        selector = ends.enter_context(selectors.DefaultSelector())
        guest = Guest(own, "one", compile_peer(tmp_path), ends)
        guest.connect(random.Random(SEED), Streams(), selector)
        monitor = ends.enter_context(QMP(own.run_directory / "one/qmp.sock", 30))

        def pause() -> None:
            nonlocal pauses
            pauses += 1
            monitor.execute("stop")
            waiting = ends.enter_context(socket.socket(socket.AF_UNIX))
            waiting.connect(str(own.run_directory / "one/agent.sock"))  # an idle device accepts connections, too
            monitor.execute("cont")

        move([guest], selector, pause)
        assert guest.surprises() == {}
        assert pauses > 2, "the pauses must come in the middle"
