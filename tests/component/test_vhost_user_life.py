"""Test the vhost-user vsock device's life: QEMU's requests, pause, reset, memory, sockets, shutdown."""

from __future__ import annotations

import os
import resource
import select
import signal
import socket
import stat
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import caisson.image.vm.vsock.vhost_user as package
from caisson.image.vm.vsock.vhost_user import packet
from caisson.image.vm.vsock.vhost_user import protocol as p
from caisson.image.vm.vsock.vhost_user.memory import GuestAddressError, Memory
from tests.component.fake_guest import GUEST, USER, Guest, Start, starter
from tests.component.vhost_device import CID, Backend


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    with starter(tmp_path) as start:
        yield start


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_features_and_configuration(start: Start) -> None:
    _, guest = start()
    assert guest.ask_u64(p.GET_FEATURES) == 1 << 32 | 1 << 30 | 1 << 29 | 1 << 28
    assert guest.ask_u64(p.GET_PROTOCOL_FEATURES) == 1 << 9 | 1 << 3
    answer = guest.ask(p.GET_CONFIG, struct.pack("<IIIQ", 0, 8, 0, 0))
    assert struct.unpack("<IIIQ", answer) == (0, 8, 0, CID)
    assert guest.ask(p.GET_CONFIG, struct.pack("<III", 4, 8, 0)) == struct.pack("<III", 4, 0, 0), "beyond its end"


def test_pause_keeps_connections(start: Start) -> None:
    backend, guest = start()
    sock, stream = guest.pair()
    for _ in range(5):
        guest.pause()
        sock.sendall(b"while it was paused")
        new = backend.connect()
        guest.resume()
        guest.until(lambda: stream.data == b"while it was paused")
        guest.echo(sock, stream)
        stream.data.clear()
        guest.accept()
        new.close()
    sock.close()


def test_pause_gives_back_receive_buffers_that_were_taken_ahead(start: Start) -> None:
    _, guest = start()
    sock, stream = guest.pair()
    stream.keep = False
    sock.setblocking(False)
    for _ in range(50):
        try:
            sock.send(bytes(50_000))  # many buffers at once, some of them taken in advance
        except BlockingIOError:
            pass
        guest.pause()
        guest.process()
        assert guest.bases[0] == guest.rx.used[1], "unused buffers must still be the guest's"
        guest.resume()
    sock.setblocking(True)
    stream.keep = True
    sock.sendall(b"the end")
    guest.until(lambda: stream.data.endswith(b"the end"))
    sock.close()


def test_reset_drops_connections(start: Start) -> None:
    backend, guest = start()
    for _ in range(5):
        sock, _ = guest.pair()
        waiting = backend.connect()
        guest.accept()
        guest.reboot()
        guest.listen()
        assert guest.ended(sock)
        assert guest.ended(waiting)
        sock, stream = guest.pair()
        guest.echo(sock, stream)
        sock.close()
    assert backend.lines() == ""


def test_a_device_that_is_unplugged_and_plugged_in_again(start: Start) -> None:
    """On the same socket: QEMU stops the rings, negotiates again, and the driver starts over."""
    _, guest = start()
    for _ in range(3):
        sock, stream = guest.pair()
        guest.echo(sock, stream)
        guest.pause()
        guest.greet()
        guest.streams.clear()
        guest.boot()
        guest.listen()
        assert guest.ended(sock)
    sock, stream = guest.pair()
    guest.echo(sock, stream)
    sock.close()


def test_another_device_goes_on_where_one_has_died(tmp_path: Path) -> None:
    """The guest's driver need not know: its connections are reset one by one, new ones work."""
    first = Backend(tmp_path)
    guest = Guest(first)
    guest.listen()
    old, stream = guest.pair()
    guest.pause()
    first.process.kill()
    assert first.process.wait(10) == -signal.SIGKILL
    second = Backend(tmp_path)
    guest.move(second)
    assert old.recv(1) == b""
    sock, new = guest.pair()
    guest.echo(sock, new)
    stream.send(b"is anybody there?")
    guest.until(lambda: stream.reset)
    guest.echo(sock, new)
    assert second.lines() == ""
    for each in (old, sock):
        each.close()
    for backend in (first, second):
        backend.close()
    guest.close()


def test_sigusr1_drops_connections_before_the_driver_is_back(start: Start) -> None:
    backend, guest = start()
    sock, _ = guest.pair()
    guest.pause()
    backend.process.send_signal(signal.SIGUSR1)
    assert sock.recv(1) == b""


def test_memory_table_may_change_while_rings_run(start: Start) -> None:
    _, guest = start()
    sock, stream = guest.pair()
    for split in (4 << 20, 8 << 20, 0):
        rows = [(0, split), (split, guest.size - split)] if split else [(0, guest.size)]
        table = struct.pack("<II", len(rows), 0)
        for offset, size in rows:
            table += struct.pack("<QQQQ", GUEST + offset, size, USER + offset, offset)
        assert guest.acknowledged(p.SET_MEM_TABLE, table, (guest.memfd,) * len(rows))
        guest.echo(sock, stream)
    sock.close()


def test_memory_checks_every_bound() -> None:
    fd = os.memfd_create("test")
    os.truncate(fd, 0x4000)
    memory = Memory.map(
        [(0x1000, 0x1000, 0x8000, 0), (0x2000, 0x1000, 0xF000, 0x2000), (0x8000, 0x1000, 0, 0)], [fd] * 3
    )
    memory.views(0x1FFC, 8)[0][:] = b"left"
    memory.views(0x1FFC, 8)[1][:] = b"half"
    assert os.pread(fd, 4, 0xFFC) + os.pread(fd, 4, 0x2000) == b"lefthalf"
    assert bytes(memory.view(0x2000, 4)) == bytes(memory.ring(0xF000, 4)) == b"half"
    assert len(memory.view(0x8000, 0x1000)) == 0x1000
    for address, length in [(0xFFF, 1), (0x1FFF, 2), (0x3000, 1), (0x8001, 0x1000), (1 << 64, 1), ((1 << 64) - 1, 2)]:
        with pytest.raises(GuestAddressError):
            memory.view(address, length)
    for address, length in [(0xFFF, 2), (0x2FFF, 2), (0x8000, 1 << 32), ((1 << 64) - 8, 1 << 32)]:
        with pytest.raises(GuestAddressError):
            memory.views(address, length)
    with pytest.raises(GuestAddressError):
        memory.ring(0x8FFF, 2)
    with pytest.raises(GuestAddressError, match="in a file of"):
        Memory.map([(0, 0x4000, 0, 0x1000)], [fd])
    os.close(fd)


@pytest.mark.parametrize(
    ("request_", "payload"),
    [
        (99, b""),
        (p.SET_FEATURES, struct.pack("<Q", 1 << 60)),
        (p.SET_FEATURES, b"short"),
        (p.SET_MEM_TABLE, b""),
        (p.SET_MEM_TABLE, struct.pack("<II", 1, 0)),
        (p.SET_MEM_TABLE, struct.pack("<IIQQQQ", 1, 0, 0, 4096, 0, 0)),
        (p.SET_VRING_NUM, struct.pack("<II", 2, 128)),
        (p.SET_VRING_NUM, struct.pack("<II", 0, 64)),
        (p.SET_VRING_BASE, struct.pack("<II", 1, 0)),
        (p.SET_VRING_CALL, struct.pack("<Q", 0)),
        (p.SET_VRING_ENABLE, struct.pack("<II", 3, 1)),
    ],
)
def test_requests_that_are_refused_change_nothing(start: Start, request_: int, payload: bytes) -> None:
    backend, guest = start()
    sock, stream = guest.pair()
    assert not guest.acknowledged(request_, payload)
    assert f"request {request_} failed" in backend.lines()
    guest.echo(sock, stream)
    sock.close()


@pytest.mark.parametrize("header", [(1, 2, 0), (1, 5, 0), (1, 1, 1 << 30), (p.GET_CONFIG, 1, 0)])
def test_nonsense_on_the_control_socket_ends_the_device(tmp_path: Path, header: tuple[int, int, int]) -> None:
    backend = Backend(tmp_path)
    backend.control.send(struct.pack("<III", *header))
    assert backend.process.wait(10) == 1
    assert backend.lines().count("\n") == 1 and "control socket" in backend.lines()
    assert names(tmp_path) == ["log"]
    backend.close()


def test_qemus_end_is_the_end(tmp_path: Path) -> None:
    backend = Backend(tmp_path)
    guest = Guest(backend)
    guest.listen()
    sock, _ = guest.pair()
    waiting = backend.connect(backend.hybrid)
    for path in (backend.hybrid, backend.raw):
        assert stat.S_IMODE(Path(path).stat().st_mode) == 0o600
    assert backend.finish() == 0
    assert sock.recv(1) == waiting.recv(1) == b""
    assert names(tmp_path) == ["log"]
    assert backend.lines() == ""
    guest.close()
    backend.close()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_end_it_cleanly(tmp_path: Path, number: signal.Signals) -> None:
    backend = Backend(tmp_path)
    backend.process.send_signal(number)
    assert backend.process.wait(10) == 0
    assert names(tmp_path) == ["log"]
    backend.close()


def test_stale_sockets_are_replaced_and_other_files_are_not(tmp_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as stale:
        stale.bind(str(tmp_path / "vsock.sock"))
    backend = Backend(tmp_path)
    backend.connect(backend.hybrid).close()
    assert backend.finish() == 0
    backend.close()
    (tmp_path / "agent.sock").write_text("precious")
    with pytest.raises(AssertionError, match=r"cannot listen on .*agent\.sock: Address already in use"):
        Backend(tmp_path)
    assert (tmp_path / "agent.sock").read_text() == "precious"
    assert not (tmp_path / "vsock.sock").exists()


def test_without_descriptors_it_waits_and_does_not_spin(start: Start) -> None:
    backend, guest = start()
    kept, stream = guest.pair()
    soft, hard = resource.prlimit(backend.process.pid, resource.RLIMIT_NOFILE)
    used = len(list(Path(f"/proc/{backend.process.pid}/fd").iterdir()))
    resource.prlimit(backend.process.pid, resource.RLIMIT_NOFILE, (used + 3, hard))
    socks = [backend.connect() for _ in range(10)]
    accepted = [guest.accept() for _ in range(3)]
    guest.echo(kept, stream)
    before = backend.cpu()
    select.select([], [], [], 0.5)
    assert backend.cpu() - before < 0.1
    assert "Too many open files" in backend.lines()
    resource.prlimit(backend.process.pid, resource.RLIMIT_NOFILE, (soft, hard))
    accepted += [guest.accept() for _ in range(7)]
    for sock in (kept, *socks):
        sock.close()
    guest.until(lambda: not guest.streams)
    assert all(each.reset or each.peer_shut == packet.SHUTDOWN_BOTH for each in accepted)


def test_idle_costs_nothing(start: Start) -> None:
    backend, guest = start()
    socks = [guest.pair()[0] for _ in range(20)]
    before = backend.cpu()
    select.select([], [], [], 0.5)
    assert backend.cpu() - before < 0.02
    for sock in socks:
        sock.close()


def test_small_packets_are_given_back_together(start: Start) -> None:
    _, guest = start(publish_delay=1000, unpublished=16, unpublished_bytes=4096)
    sock, stream = guest.pair()
    guest.pause()
    assert guest.tx.used[1] == guest.tx.index, "nothing may be buffered while the rings are stopped"
    guest.resume()

    def missing() -> int:
        return (guest.tx.index - guest.tx.used[1]) & 0xFFFF

    for count in range(1, 16):
        stream.packet(packet.CREDIT_UPDATE)
        guest.settle()
        assert missing() == count
    stream.packet(packet.CREDIT_UPDATE)
    guest.until(lambda: not missing())
    stream.send(b"small")
    assert guest.host_receives(sock, 5) == b"small"
    assert missing() == 1
    stream.send(bytes(5000))
    guest.until(lambda: not missing())
    sock.close()


def test_a_small_packet_is_given_back_soon(start: Start) -> None:
    _, guest = start()
    sock, stream = guest.pair()
    stream.packet(packet.CREDIT_UPDATE)
    guest.until(lambda: guest.tx.used[1] == guest.tx.index)
    sock.close()


def test_it_starts_without_a_warning(tmp_path: Path) -> None:
    """Newer Pythons warn if a program replaces its own package."""
    home = Path(package.__file__).parent
    words = [sys.executable, "-I", "-S", "-W", "error", str(home), "--help"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=30)
    assert (done.returncode, done.stderr) == (0, "")
