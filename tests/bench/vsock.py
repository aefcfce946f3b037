"""Measure our vsock device against a virtio-serial port and QEMU's user-mode network, in one guest and one run.

Latency is the round trip of a 64-byte request and a 64-byte response; bulk is one stream of some MB in one direction,
as time per MiB.  All three are measured in turn, round by round, and a ratio is the median of the rounds' ratios: other
load slows all of them alike.  A virtio-serial port is inside QEMU, and one stream: the best the guest and QEMU can do.
Then many connections are opened at once, used, and left idle.

    python -m tests.bench.vsock [--rounds N] [--mb N] [--connections N] [--quick] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import select
import socket
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from caisson.agent.client import Agent, default_spec
from caisson.image.vm.qmp import QMP
from caisson.proto.kata1 import agent_pb2, oci_pb2, types_pb2
from tests.bench.rows import Row, table
from tests.e2e.conftest import Caisson, fresh
from tests.e2e.vsock_host import ECHO, REQUEST, SINK, SOURCE, compile_peer, dial

VSOCK_PORT, TCP_PORT = 2000, 2001
MAC = "52:54:00:00:00:77"
MESSAGE = 64
PIECE = 1 << 18
MIB = (1 << 20) / 1e3  # ms per MiB are this divided by MB/s
STALL_TIMEOUT = 20
ROUNDS, MEGABYTES, MESSAGES, CONNECTIONS = 15, 16, 200, 4000
QUICK_ROUNDS, QUICK_MEGABYTES, QUICK_CONNECTIONS = 10, 4, 600
TRANSPORTS = ("vsock", "virtio-serial", "user-net TCP")

#: Allowed multiples of the peer: for a round trip, and for a MiB (0.8 times as fast).
SERIAL_LATENCY, SERIAL_BULK, NET = 1.3, 1.25, 1.0
MEMORY_MIB = 24.0
#: Out of 3 s: the kernel's own work for a sleeping process.
IDLE_MS = 1.0


class Stuck(Exception):
    """A transport has stalled."""


class Machine:
    """A booted VM with all three transports, and the program that serves them."""

    def __init__(self, caisson: Caisson, work: Path) -> None:
        self._directory = caisson.run_directory / "bench"
        self._serial_path = self._directory / "serial.sock"  # QEMU cannot write anywhere else
        with socket.create_server(("127.0.0.1", 0)) as probe:
            self._port = probe.getsockname()[1]
        command = ("boot-vm", "--name", "bench", "--detach", "--memory", "1024")
        booted = caisson(*command, "--append", "agent.hotplug_timeout=60s")
        if booted.returncode:
            raise SystemExit(booted.stderr.decode())
        self.pids = caisson.info("bench")["pids"]
        root = caisson.manifest("bench")["containers"]["busybox"]
        program = compile_peer(work).read_bytes()
        asyncio.run(asyncio.wait_for(self._prepare(root, program), 240))
        serial = socket.socket(socket.AF_UNIX)
        serial.connect(str(self._serial_path))
        self._streams = {"virtio-serial": serial}

    def stream(self, transport: str) -> socket.socket:
        """Return the connection on which a transport is measured."""
        if transport not in self._streams:
            self._streams[transport] = self.dial() if transport == "vsock" else self._dial_tcp()
        return self._streams[transport]

    def guest(self) -> int:
        """Return the vCPU thread: QEMU's busiest except the first."""
        threads = {int(path.name) for path in Path(f"/proc/{self.pids['qemu']}/task").iterdir()}
        return max(threads - {self.pids["qemu"]}, key=busy)

    def dial(self) -> socket.socket:
        return dial(self._directory / "vsock.sock", VSOCK_PORT)

    def close(self) -> None:
        for stream in self._streams.values():
            stream.close()

    def _dial_tcp(self) -> socket.socket:
        stream = socket.create_connection(("127.0.0.1", self._port))
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        return stream

    async def _prepare(self, root: str, program: bytes) -> None:
        async with Agent.connect(self._directory / "agent.sock") as client:
            await client.create_sandbox()
            address = types_pb2.IPAddress(address="10.0.2.15", mask="24")
            wanted = types_pb2.Interface(name="eth0", hwAddr=MAC, mtu=1500, IPAddresses=[address], pciPath="11/00")
            request = agent_pb2.UpdateInterfaceRequest(interface=wanted)
            waiting = asyncio.ensure_future(client.rpc.UpdateInterface(request, 120))
            await client.version()  # by now it waits
            await asyncio.to_thread(self._plug)
            await waiting
            finding = default_spec(root, ["/bin/sh", "-c", FIND_SERIAL])
            container = await client.create_container("find", finding)
            await container.start()
            major, minor = b"".join([data async for data in container.init().stdout()]).decode().split(":")
            await container.remove()
            copy = agent_pb2.CopyFileRequest(
                path="/run/caisson-bench/peer", file_size=len(program), file_mode=0o100755, dir_mode=0o755, data=program
            )
            await client.rpc.CopyFile(copy)
            words = ["/tmp/peer", f"vsock:{VSOCK_PORT}", f"tcp:{TCP_PORT}", "file:/dev/serial"]
            spec = default_spec(root, words)
            mount = oci_pb2.Mount(destination="/tmp/peer", source=copy.path, type="bind", options=["rbind", "exec"])
            spec.Mounts.append(mount)
            device: dict[str, Any] = {"Type": "c", "Major": int(major), "Minor": int(minor)}
            spec.Linux.Devices.append(oci_pb2.LinuxDevice(Path="/dev/serial", **device))
            spec.Linux.Resources.Devices.append(oci_pb2.LinuxDeviceCgroup(Allow=True, Access="rw", **device))
            await (await client.create_container("peer", spec)).start()

    def _plug(self) -> None:
        with QMP(self._directory / "qmp.sock", 30) as monitor:
            address = {"type": "unix", "data": {"path": str(self._serial_path)}}
            backend = {"type": "socket", "data": {"addr": address, "server": True, "wait": False}}
            monitor.execute("chardev-add", {"id": "serial", "backend": backend})
            monitor.execute("device_add", {"driver": "virtio-serial-pci", "id": "s", "bus": "port0"})
            port = {"driver": "virtserialport", "id": "p", "chardev": "serial", "bus": "s.0"}
            monitor.execute("device_add", port)
            forward = [{"str": f"tcp:127.0.0.1:{self._port}-:{TCP_PORT}"}]
            monitor.execute("netdev_add", {"type": "user", "id": "n", "hostfwd": forward})
            interface = {"driver": "virtio-net-pci", "id": "i", "netdev": "n", "mac": MAC, "bus": "port1"}
            monitor.execute("device_add", interface)


#: Waits until the port exists, and prints its device number.
FIND_SERIAL = "until cat /sys/class/virtio-ports/*/dev 2>/dev/null; do sleep 0.1; done"


def exactly(sock: socket.socket, size: int, buffer: memoryview) -> None:
    while size:
        got = sock.recv_into(buffer, min(size, len(buffer)))
        if not got:
            raise SystemExit("the guest's end has ended")
        size -= got


def ping_pong(sock: socket.socket, count: int) -> list[float]:
    """Return the microseconds of each of ``count`` round trips."""
    buffer, message = memoryview(bytearray(MESSAGE)), bytes(MESSAGE)
    sock.sendall(REQUEST.pack(ECHO, 0, 0, MESSAGE, count * MESSAGE, 0, 0))
    took = []
    for _ in range(count):
        began = time.perf_counter()
        sock.sendall(message)
        exactly(sock, MESSAGE, buffer)
        took.append((time.perf_counter() - began) * 1e6)
    return took


def to_guest(sock: socket.socket, size: int) -> float:
    """Return MB/s into the guest; its answer means that it has read everything."""
    data, buffer = bytes(PIECE), memoryview(bytearray(1))
    began = time.perf_counter()
    sock.sendall(REQUEST.pack(SINK, 0, 0, 0, size, 0, 0))
    for _ in range(size // PIECE):
        sock.sendall(data)
    exactly(sock, 1, buffer)
    return size / (time.perf_counter() - began) / 1e6


def from_guest(sock: socket.socket, size: int) -> float:
    """Return MB/s out of the guest."""
    buffer = memoryview(bytearray(PIECE))
    began = time.perf_counter()
    sock.sendall(REQUEST.pack(SOURCE, 0, 0, 0, 0, size, 0))
    exactly(sock, size, buffer)
    return size / (time.perf_counter() - began) / 1e6


def cpu(pid: int) -> float:
    """Return the seconds of CPU time a process has used."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def busy(pid: int) -> float:
    """Return the milliseconds of CPU time of a thread, or a single-threaded process: finer than ``cpu``."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e6


def memory(pid: int) -> float:
    """Return the MiB of a process without the guest's memory, which it shares."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return sum(int(fields[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1024


@dataclass
class Samples:
    """Measurements of one transport in each round: round trips (us), a MiB each way (ms).

    For each MiB also the time the vCPU was busy: nothing outside the guest can make it faster than that.
    """

    trips: list[list[float]]
    down: list[float]
    up: list[float]
    down_least: list[float]
    up_least: list[float]


def measure(machine: Machine, rounds: int, size: int) -> dict[str, Samples]:
    """Measure all transports in turn; the first round warms up caches and is discarded.  Raises Stuck."""
    found = {transport: Samples([], [], [], [], []) for transport in TRANSPORTS}
    guest = machine.guest()
    for number in range(rounds + 1):
        for transport, samples in found.items():
            stream = machine.stream(transport)
            stream.settimeout(STALL_TIMEOUT)
            try:
                trips = ping_pong(stream, MESSAGES)
                began = busy(guest)
                down, between = to_guest(stream, size), busy(guest)
                up, ended = from_guest(stream, size), busy(guest)
            except TimeoutError:
                raise Stuck(transport) from None
            if number:
                samples.trips.append(trips)
                samples.down.append(MIB / down)
                samples.up.append(MIB / up)
                samples.down_least.append((between - began) / (size >> 20))
                samples.up_least.append((ended - between) / (size >> 20))
    return found


def compare(found: dict[str, Samples]) -> Iterator[Row]:
    """Compare our device with each of the others."""

    def p99(trips: list[float]) -> float:
        return statistics.quantiles(trips, n=100)[98]

    own = found["vsock"]
    figures: list[tuple[str, Callable[[Samples], list[float]], list[float], float | None, float | None]] = [
        ("round trip (us)", lambda each: [*map(statistics.median, each.trips)], [], SERIAL_LATENCY, NET),
        ("round trip, p99 (us)", lambda each: [*map(p99, each.trips)], [], None, None),
        ("a MiB to the guest (ms)", lambda each: each.down, own.down_least, SERIAL_BULK, NET),
        ("a MiB from the guest (ms)", lambda each: each.up, own.up_least, SERIAL_BULK, NET),
    ]
    for what, figure, least, *budgets in figures:
        ours, limit = figure(own), statistics.median(least) if least else None
        for peer, budget in zip(TRANSPORTS[1:], budgets, strict=True):
            theirs = figure(found[peer])
            ratio = statistics.median(own / other for own, other in zip(ours, theirs, strict=True))
            median, other = statistics.median(ours), statistics.median(theirs)
            yield Row(f"vsock beside {peer}: {what}", median, other, limit=limit, ratio=ratio, budget=budget)


def crowd(machine: Machine, count: int) -> Iterator[Row]:
    """Measure many connections at once: each is used, then all are idle."""
    device = machine.pids["vsock"]
    with ExitStack() as ends:
        began = time.perf_counter()
        socks = [ends.enter_context(machine.dial()) for _ in range(count)]
        opened = (time.perf_counter() - began) * 1e3 / count
        yield Row(f"vsock, {count} connections: to open one (ms)", opened)
        for sock in socks:
            ping_pong(sock, 1)
        trips = ping_pong(machine.stream("vsock"), MESSAGES)
        yield Row("vsock, round trip among them (us)", statistics.median(trips))
        yield Row("vsock, memory of the device with them (MiB)", memory(device), budget=MEMORY_MIB)
        before = busy(device)
        select.select([], [], [], 3)
        yield Row("vsock, processor time in 3 s of idleness (ms)", busy(device) - before, budget=IDLE_MS)


@contextmanager
def machine() -> Iterator[Machine]:
    with tempfile.TemporaryDirectory(prefix="caisson-bench-") as work, fresh() as caisson, ExitStack() as ends:
        ends.callback(caisson, "stop-vm", "--all")
        booted = Machine(caisson, Path(work))
        ends.callback(booted.close)
        yield booted


def measured(rounds: int, size: int, connections: int) -> list[Row]:
    """Return the table."""
    attempts = 3
    while True:
        with machine() as booted:
            try:
                return [*compare(measure(booted, rounds, size)), *crowd(booted, connections)]
            except Stuck as stuck:
                # Occasionally QEMU 7.2 stops reading from a port's socket.
                attempts -= 1
                print(f"{stuck}: stalled for {STALL_TIMEOUT} s", file=sys.stderr)
                if not attempts or str(stuck) != "virtio-serial":
                    raise


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.vsock", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of everything (default: %(default)s)")
    parser.add_argument("--mb", type=int, default=MEGABYTES, help="of a bulk transfer (default: %(default)s)")
    parser.add_argument("--connections", type=int, default=CONNECTIONS, help="open at once (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="less of all this, in place of it")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.mb, options.connections = QUICK_ROUNDS, QUICK_MEGABYTES, QUICK_CONNECTIONS
    rows = measured(options.rounds, options.mb << 20, options.connections)
    print(json.dumps([row.plain() for row in rows]) if options.json else "\n".join(table(rows)))
    sys.exit(any(row.passed is False for row in rows))


if __name__ == "__main__":
    main()
