"""Test `caisson forward`: host ports and guest ports."""

from __future__ import annotations

import json
import random
import socket
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.e2e.conftest import TIMEOUT, Caisson
from tests.support.poll import wait_until

pytestmark = pytest.mark.vm


@contextmanager
def forwarding(vm: Caisson, *words: str) -> Iterator[int]:
    """Run `caisson forward` during the block; yield the host's port."""
    with vm.start("forward", *words, stderr=subprocess.PIPE) as command:
        try:
            assert command.stderr is not None
            said = command.stderr.readline().decode()
            assert said.startswith("caisson: 127.0.0.1:"), said
            yield int(said.split()[1].rpartition(":")[2])
            command.send_signal(2)
            assert command.wait(TIMEOUT) == 130
        finally:
            command.kill()


def exchange(port: int, data: bytes) -> bytes:
    """Send everything, then EOF, and return everything received."""
    with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:

        def send() -> None:
            connection.sendall(data)
            connection.shutdown(socket.SHUT_WR)

        sender = threading.Thread(target=send)
        sender.start()
        received = b""
        while piece := connection.recv(65536):
            received += piece
        sender.join()
        return received


def test_a_tcp_port_of_the_guest(vm: Caisson) -> None:
    server = "exec nc -ll -p 8080 -e cat"
    vm.make_containers("server", "client")
    with vm.start("exec", "--container", "server", "--", "sh", "-c", server, stdin=subprocess.DEVNULL) as serving:
        try:
            listens = ("exec", "--container", "server", "--", "sh", "-c", "netstat -ltn | grep -q :8080")
            wait_until(lambda: vm(*listens).returncode == 0, "it listens")
            data = random.Random(5).randbytes(300_000)
            with forwarding(vm, "0:8080", "--container", "client") as port:
                assert exchange(port, data) == data
                assert exchange(port, b"again") == b"again"
            with forwarding(vm, "0:8081", "--container", "client") as port:
                assert exchange(port, b"nobody there") == b""
        finally:
            serving.terminate()


def test_a_vsock_port_of_the_guest(vm: Caisson) -> None:
    with forwarding(vm, "0:vsock:1024") as port:  # the agent: its first frame replies to the HTTP/2 preface
        with socket.create_connection(("127.0.0.1", port), timeout=TIMEOUT) as connection:
            connection.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\x00\x00\x00\x04\x00\x00\x00\x00\x00")
            assert connection.recv(9)[3] == 4  # SETTINGS
    with forwarding(vm, "0:vsock:4242") as port:
        assert exchange(port, b"") == b""
        what = f"127.0.0.1:{port} → vsock port 4242"
        assert json.loads(vm("list-vms", "--json").stdout)[0]["ports"] == [what]
        assert vm("list-vms").stdout.decode().splitlines()[1].endswith(what)
    assert json.loads(vm("list-vms", "--json").stdout)[0]["ports"] == []


def test_a_port_of_the_host(vm: Caisson) -> None:
    """A guest's connection to a vsock port of the host arrives at the VM's socket for it."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        with forwarding(vm, f"{server.getsockname()[1]}:vsock:5000", "--reverse"):
            with socket.socket(socket.AF_UNIX) as guest:
                guest.settimeout(TIMEOUT)
                guest.connect(str(vm.run_directory / "default/vsock.sock_5000"))
                guest.sendall(b"question")
                connection, _ = server.accept()
                with connection:
                    assert connection.recv(8) == b"question"
                    connection.sendall(b"answer")
                    connection.shutdown(socket.SHUT_WR)
                    assert guest.recv(100) == b"answer"
                    assert guest.recv(100) == b""
            second = vm("forward", "1:vsock:5000", "--reverse")
            assert second.returncode == 2 and b"is forwarded already (127.0.0.1:" in second.stderr
    assert not (vm.run_directory / "default/vsock.sock_5000").exists()


def test_a_port_where_nothing_listens_is_named(vm: Caisson) -> None:
    with vm.start("forward", "localhost:0:8081", stderr=subprocess.PIPE) as command:
        try:
            assert command.stderr is not None
            said = command.stderr.readline().decode()
            assert said.startswith("caisson: 127.0.0.1:"), said
            assert exchange(int(said.split()[1].rpartition(":")[2]), b"x") == b""
            assert command.stderr.readline() == b"caisson: tcp port 8081: nothing listens there in the guest\n"
        finally:
            command.kill()


@pytest.mark.parametrize("rule", ["80", "a:80", "1:2:3:4", "70000:80", "80:70000", "80:udp:80", "80:80 --reverse"])
def test_forward_rejects_malformed_rules(vm: Caisson, rule: str) -> None:
    done = vm("forward", *rule.split())
    assert done.returncode == 2 and done.stderr.startswith(b"caisson: ") and done.stderr.count(b"\n") == 1


def test_a_port_that_is_taken(vm: Caisson) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        done = vm("forward", f"{server.getsockname()[1]}:vsock:1024")
        assert done.returncode == 2 and b"cannot listen" in done.stderr


def test_it_ends_with_the_vm(own: Caisson) -> None:
    assert own("boot-vm", "--name", "short", "--detach").returncode == 0
    with own.start("forward", "0:vsock:1024", "--name", "short", stderr=subprocess.PIPE) as command:
        assert command.stderr is not None and command.stderr.readline()
        assert own("stop-vm", "--name", "short").returncode == 0
        assert command.wait(TIMEOUT) == 0
