"""Test the remote hypervisor service, called as by a Kata shim, with fake VMs."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.base.log import Log
from caisson.agent.hypervisor.peer import Peer, PeerError
from caisson.agent.hypervisor.server import ServiceError, _listening, _Server
from caisson.agent.hypervisor.service import PREFIX, Sandboxes, size_of
from caisson.agent.pods.machines import MachineError
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.commands.pods import Pods
from caisson.image.vm import VMConfig
from caisson.image.vm.snapshot.snapshot import Snapshot
from caisson.proto.contract import VERSION
from caisson.proto.kata3 import hypervisor_pb2
from tests.support.poll import until


class FakeMachines:
    """Starts nothing: starting a VM blocks until it is stopped, and then fails."""

    def __init__(self, place: Path) -> None:
        self.place = place
        self.asked: list[tuple[str, int, int]] = []
        self.stopped = threading.Event()

    pids = ()

    def start(self, name: str, *, memory: int, cpus: int, share: tuple[str, Path] | None = None) -> Any:
        self.asked.append((name, memory, cpus))
        assert self.stopped.wait(30)
        raise MachineError(f"VM {name!r}: was stopped")

    def stop(self, name: str) -> None:
        self.stopped.set()

    def agent_socket(self, name: str) -> Path:
        return self.place / name / "agent.sock"


class FakeService:
    """A service with fake machines; ``call`` reconnects every time, as a shim does."""

    def __init__(self, place: Path) -> None:
        self.path = place / "hypervisor.sock"
        self.machines = FakeMachines(place)
        self.sandboxes = Sandboxes(self.machines, Log("fatal"))

    async def call(self, method: str, timeout: float | None = None, **fields: Any) -> Any:
        descriptor = hypervisor_pb2.DESCRIPTOR.services_by_name["Hypervisor"]
        request = getattr(hypervisor_pb2, f"{method}Request")(**fields)
        async with await Client.connect(self.path) as client:
            return await getattr(Stub(client, descriptor), method)(request, timeout=timeout)

    async def refused(self, method: str, timeout: float | None = None, **fields: Any) -> tuple[StatusCode, str]:
        with pytest.raises(RpcError) as failure:
            await self.call(method, timeout, **fields)
        return failure.value.code, failure.value.text


@pytest.fixture
async def service(tmp_path: Path) -> AsyncIterator[FakeService]:
    fake = FakeService(tmp_path)
    server = _Server(fake.sandboxes, Log("fatal"))
    with _listening(fake.path) as listener:
        accepting = asyncio.ensure_future(server.accept(listener))
        yield fake
        accepting.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await accepting
    await fake.sandboxes.end_all()
    server.close()
    assert not fake.path.exists()


async def test_a_vm_is_prepared_with_the_size_of_the_annotations(service: FakeService) -> None:
    annotations = {f"{PREFIX}default_memory": "2048", f"{PREFIX}default_vcpus": "3", f"{PREFIX}machine_type": "q35"}
    answer = await service.call("CreateVM", id="pod", annotations=annotations)
    assert service.machines.asked == []
    starting = asyncio.ensure_future(service.refused("StartVM", id="pod"))
    await until(lambda: service.machines.asked != [], "it is started")
    [(name, *size)] = service.machines.asked
    assert answer.agentSocketPath == str(service.machines.agent_socket(name)) and size == [2048, 3]
    assert await service.refused("StartVM", id="pod") == (
        StatusCode.FAILED_PRECONDITION, "sandbox pod: its VM was already started",
    )  # fmt: skip
    await service.call("StopVM", id="pod")
    assert await starting == (StatusCode.UNKNOWN, f"VM {name!r}: was stopped")


async def test_a_deadline_ends_a_start_and_the_id_is_free_again(service: FakeService) -> None:
    await service.call("CreateVM", id="pod")
    assert (await service.refused("StartVM", 0.2, id="pod"))[0] == StatusCode.DEADLINE_EXCEEDED
    await until(service.machines.stopped.is_set, "the VM is stopped")
    await service.call("StopVM", id="pod")
    await service.call("CreateVM", id="pod")


async def test_calls_that_make_no_sense_are_refused(service: FakeService) -> None:
    assert (await service.refused("StartVM", id="nobody"))[0] == StatusCode.NOT_FOUND
    await service.call("StopVM", id="nobody")
    for bad in ("", "../../etc", "a/b", "x" * 129):
        assert (await service.refused("CreateVM", id=bad))[0] == StatusCode.INVALID_ARGUMENT
    await service.call("CreateVM", id="pod")
    assert (await service.refused("CreateVM", id="pod"))[0] == StatusCode.ALREADY_EXISTS
    assert (await service.call("Version", version="x")).version == VERSION


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("default_memory", "-1"),
        ("default_memory", "much"),
        ("default_vcpus", "256"),
        ("default_memory", "9" * 30),
        ("image", "/somewhere"),
        ("default_gpus", "1"),
        ("cc_init_data", "x"),
    ],
)
async def test_annotations_that_cannot_be_met_fail_the_pod(service: FakeService, name: str, value: str) -> None:
    code, text = await service.refused("CreateVM", id="pod", annotations={PREFIX + name: value})
    assert code == StatusCode.INVALID_ARGUMENT and PREFIX + name in text
    await service.call("CreateVM", id="pod")


def test_sizes_that_are_not_given_are_the_services() -> None:
    assert size_of({}) == size_of({f"{PREFIX}default_memory": "0", f"{PREFIX}default_vcpus": ""}) == (0, 0)


async def test_a_sandbox_ends_with_the_process_that_made_it(service: FakeService, tmp_path: Path) -> None:
    """Not with its connection: a shim reconnects for each call."""
    program = tmp_path / "shim.py"
    program.write_text(
        "import socket, sys\nfrom caisson.agent.rpc.ttrpc import frames\n"
        "from caisson.proto.kata3 import hypervisor_pb2\n"
        "with socket.socket(socket.AF_UNIX) as one:\n"
        "    one.connect(sys.argv[1])\n"
        "    request = hypervisor_pb2.CreateVMRequest(id='pod').SerializeToString()\n"
        "    one.sendall(frames.request(1, 'hypervisor.Hypervisor', 'CreateVM', request))\n"
        "    one.recv(4096)\n"
        "print(flush=True)\nsys.stdin.read()\n"
    )
    process = await asyncio.create_subprocess_exec(
        sys.executable, program, service.path, stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    await process.stdout.readline()
    assert (await service.refused("CreateVM", id="pod"))[0] == StatusCode.ALREADY_EXISTS
    process.kill()
    await process.wait()
    await until(lambda: not service.sandboxes.ids, "the sandbox is gone")
    await service.call("CreateVM", id="pod")


def test_a_peer_is_known_by_its_process() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        peer = Peer(ours)
        assert peer.pid == os.getpid() and not peer.ended
        assert peer.is_directory("/proc/self/ns") and not peer.is_directory("/proc/version")
        namespace = peer.mount_namespace()
        assert os.fstat(namespace).st_ino == Path("/proc/self/ns/mnt").stat().st_ino
        os.close(namespace)
        peer.close()


def test_a_peer_of_another_user_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with ours, theirs, pytest.raises(PeerError, match="only user 12345 is served"):
        Peer(ours)


def test_a_socket_of_a_killed_service_is_replaced_and_one_in_use_is_not(tmp_path: Path) -> None:
    path = tmp_path / "new" / "h.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))
    with _listening(path):
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(ServiceError, match="another service is listening there"), _listening(path):
            pass
    assert not path.exists()


def test_what_is_larger_than_the_snapshot_is_booted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The shim's request and the service's own options: the larger one wins."""
    saved: Any = SimpleNamespace(memory=512, cpus=1)
    monkeypatch.setattr(Snapshot, "named", lambda name: saved)
    monkeypatch.setattr(VMConfig, "clone", lambda snapshot, **changes: "a clone")

    def made(memory: int, cpus: int, options: dict[str, int] | None = None) -> Any:
        settings = {"image": str(tmp_path), "snapshot": "s", **(options or {})}
        config: Any = Pods(settings)._config(settings, "vm", memory, cpus, {})
        return config if config == "a clone" else (config.memory, config.cpus)

    assert made(0, 0) == made(512, 1) == made(256, 0, {"memory": 512, "cpus": 1}) == "a clone"
    assert made(0, 2) == (512, 2)
    assert made(600, 0) == (600, 1)
    assert made(0, 0, {"memory": 1024}) == (1024, 1)
