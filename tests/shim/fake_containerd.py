"""Play containerd for a shim: create bundles, run the shim's program, call the Task service and receive events."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

from google.protobuf import message_factory
from google.protobuf.empty_pb2 import Empty

from caisson.agent.base.log import Log
from caisson.agent.base.tracing import Tracing
from caisson.agent.rpc.codes import StatusCode
from caisson.agent.rpc.dispatch import Dispatch, Service
from caisson.agent.rpc.server import Server
from caisson.agent.rpc.ttrpc.client import Client, Stub
from caisson.agent.rpc.ttrpc.responses import RpcError
from caisson.proto.containerd import bootstrap_pb2, events_pb2, publisher_pb2, task_v2_pb2, task_v3_pb2
from tests.shim.native_machines import NSEXEC, PLACE
from tests.support.source import ROOT

#: containerd's namespace.
NAMESPACE = "tests"

#: Timeout in seconds, on a busy machine.
TIMEOUT = 60.0

SERVICES = {2: task_v2_pb2, 3: task_v3_pb2}

SHIM = f"""#!{sys.executable}
import sys
sys.path.insert(0, "{ROOT}")
from caisson.commands.shim import run_and_exit
class Source:
    def prepare(self):
        pass
    def machines(self, options):
        from tests.shim.native_machines import NativeMachines  # late: `start` is measured
        return NativeMachines()
run_and_exit(Source())
"""

MOUNTS = [
    {"destination": "/proc", "type": "proc", "source": "proc"},
    {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
    {"destination": "/dev/pts", "type": "devpts", "source": "devpts", "options": ["newinstance", "ptmxmode=0666"]},
    {"destination": "/dev/shm", "type": "bind", "source": "/dev/shm", "options": ["rbind"]},
]


def process(*args: str, terminal: bool = False, **fields: Any) -> dict[str, Any]:
    """Return an OCI process."""
    user = {"uid": 0, "gid": 0}
    return {"args": args, "env": ["PATH=/bin"], "cwd": "/", "user": user, "terminal": terminal, **fields}


def limits(value: bytes) -> dict[str, object]:
    """Return the resources of an Update."""
    return {"type_url": "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources", "value": value}


class FakeContainerd:
    """A containerd directory: sockets, bundles, and the shim's program."""

    def __init__(self, place: Path, nsexec: Path, rootfs: Path) -> None:
        self.place = place
        self.rootfs = rootfs
        self.events: list[tuple[str, Any]] = []  # topics and messages, in order of arrival
        self._news = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._accepting: Server | None = None
        self._clients: list[Client] = []
        self._program = place / "containerd-shim-caisson-v2"
        self._program.write_text(SHIM)
        self._program.chmod(0o755)
        self.environment = os.environ | {
            "TTRPC_ADDRESS": f"{place}/ttrpc",
            "CAISSON_RUN": f"{place}/run",
            PLACE: f"{place}/agents",
            NSEXEC: str(nsexec),
        }

    async def __aenter__(self) -> Self:
        await self.listen()
        return self

    async def __aexit__(self, *_: object) -> None:
        for client in self._clients:
            await client.close()
        await self.close()

    async def listen(self) -> None:
        """Receive events."""
        service = Service(publisher_pb2.DESCRIPTOR.services_by_name["Events"], FakeContainerd)
        self._accepting = Server(
            Log("error"), ttrpc=Dispatch(service.bind(self), Log("error"), Tracing(""), _no_status)
        )
        loop = asyncio.get_running_loop()
        self._server = await loop.create_unix_server(self._accepting.accept, f"{self.place}/ttrpc")

    async def close(self) -> None:
        """Stop receiving events, like a containerd being restarted."""
        assert self._server is not None and self._accepting is not None
        self._server.close()
        await self._accepting.stop(grace=0)
        (self.place / "ttrpc").unlink(missing_ok=True)

    async def Forward(self, request: Any) -> Empty:
        envelope = request.envelope
        assert envelope.namespace == NAMESPACE and envelope.timestamp.seconds
        name = envelope.event.type_url.rpartition(".")[2]
        async with self._news:
            self.events.append((envelope.topic, getattr(events_pb2, name).FromString(envelope.event.value)))
            self._news.notify_all()
        return Empty()

    def topics(self, container_id: str) -> list[str]:
        """Return the events of a container: topics, without "/tasks/"; those of execs with their ids."""
        found = []
        for topic, event in self.events:
            if event.container_id == container_id:
                exec_id = getattr(event, "exec_id", "") or getattr(event, "id", "")
                of_exec = f" {exec_id}" if exec_id and exec_id != container_id else ""
                found.append(topic.removeprefix("/tasks/") + of_exec)
        return found

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until a condition on the events holds."""
        try:
            async with asyncio.timeout(TIMEOUT), self._news:
                await self._news.wait_for(condition)
        except TimeoutError:
            raise AssertionError(f"only these events: {self.events}") from None

    def bundle(self, container_id: str, spec: dict[str, Any]) -> Path:
        """Create a bundle."""
        path = self.place / "bundles" / container_id
        (path / "rootfs").mkdir(parents=True)
        (path / "config.json").write_text(json.dumps(spec))
        (path / "log").touch()  # containerd's is a FIFO
        return path

    def spec(self, *args: str, **fields: Any) -> dict[str, Any]:
        """Return a configuration like containerd's."""
        namespaces = [{"type": kind} for kind in ("pid", "ipc", "uts", "mount", "network")]
        return {
            "ociVersion": "1.1.0", "process": process(*args), "root": {"path": "rootfs"}, "mounts": MOUNTS,
            "linux": {"namespaces": namespaces}, **fields,
        }  # fmt: skip

    async def run_shim(self, bundle: Path, *words: str, stdin: bytes = b"") -> bytes:
        """Run the shim's program to completion; return its output on either stream."""
        command = ["-namespace", NAMESPACE, "-address", f"{self.place}/grpc", "-id", bundle.name, *words]
        program = await asyncio.create_subprocess_exec(
            self._program, *command, cwd=bundle, env=self.environment, stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT,
        )  # fmt: skip
        async with asyncio.timeout(TIMEOUT):
            answer, _ = await program.communicate(stdin)
        assert program.returncode == 0, answer
        return answer

    async def start(self, container_id: str, *args: str, version: int = 3, **fields: Any) -> Task:
        """Create a bundle, start its shim, and connect to it."""
        bundle = self.bundle(container_id, self.spec(*args, **fields))
        parameters = bootstrap_pb2.BootstrapParams(instance_id=container_id, namespace=NAMESPACE)
        answer = await self.run_shim(bundle, "start", stdin=parameters.SerializeToString() if version == 3 else b"")
        address = json.loads(answer)["address"] if version == 3 else answer.decode()
        client = await Client.connect(address.removeprefix("unix://"))
        self._clients.append(client)
        return Task(self, bundle, address, client, version)

    async def run(self, container_id: str, *args: str, **fields: Any) -> Task:
        """Start a shim, create a container, and start it."""
        task = await self.start(container_id, *args, **fields)
        await task.create()
        await task.call("Start")
        return task

    async def delete_program(self, task: Task) -> Any:
        """Run the program's `delete`, and return its output."""
        return task_v3_pb2.DeleteResponse.FromString(await self.run_shim(task.bundle, "delete"))


class Task:
    """A container's bundle, and a connection to its shim."""

    def __init__(self, containerd: FakeContainerd, bundle: Path, address: str, client: Client, version: int) -> None:
        self.id = bundle.name
        self.bundle = bundle
        self.address = address
        self._containerd = containerd
        descriptor = SERVICES[version].DESCRIPTOR.services_by_name["Task"]
        self._client = client
        self._requests = {one.name: message_factory.GetMessageClass(one.input_type) for one in descriptor.methods}
        self._rpc: Any = Stub(client, descriptor)

    async def call(self, method: str, **fields: Any) -> Any:
        """Call a method for this container."""
        request = self._requests[method](**{"id": self.id, **fields})
        return await getattr(self._rpc, method)(request, timeout=TIMEOUT)

    async def refused(self, method: str, **fields: Any) -> tuple[StatusCode, str]:
        """Return the status and text of a call that must fail."""
        try:
            await self.call(method, **fields)
        except RpcError as error:
            return error.code, error.text
        raise AssertionError(f"{method} should have failed")

    async def create(self, *mounts: tuple[str, str, list[str]], **fields: Any) -> Any:
        """Create the container.  ``mounts`` (type, source, options) are its root: bind-mounted from busybox's if none
        is given.
        """
        root = task_v3_pb2.DESCRIPTOR.pool.FindMessageTypeByName("containerd.types.Mount")
        make = message_factory.GetMessageClass(root)
        wanted = mounts or (("bind", str(self._containerd.rootfs), ["rbind", "ro"]),)
        rootfs = [make(type=type_, source=source, options=options) for type_, source, options in wanted]
        return await self.call("Create", bundle=str(self.bundle), rootfs=rootfs, **fields)

    async def exec(self, exec_id: str, *args: str, terminal: bool = False, **fields: Any) -> None:
        """Add a process, and start it."""
        await self.add(exec_id, *args, terminal=terminal, **fields)
        await self.call("Start", exec_id=exec_id)

    async def add(self, exec_id: str, *args: str, terminal: bool = False, **fields: Any) -> None:
        """Add a process."""
        spec = {
            "type_url": "types.containerd.io/opencontainers/runtime-spec/1/Process",
            "value": json.dumps(process(*args, terminal=terminal)).encode(),
        }
        await self.call("Exec", exec_id=exec_id, spec=spec, terminal=terminal, **fields)

    async def disconnect(self) -> None:
        """Close the connection; pending calls fail."""
        await self._client.close()

    async def end(self) -> None:
        """Kill the container if it is running, delete it, and shut the shim down."""
        await self.call("Kill", signal=9, all=True)
        await self.call("Wait")
        await self.call("Delete")
        await self.call("Shutdown")


class Fifo:
    """A client's stream: a FIFO, whose local end is open."""

    def __init__(self, path: Path, flags: int) -> None:
        os.mkfifo(path)
        self.path = str(path)
        self.fd = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)

    async def read(self) -> bytes:
        """Read until EOF."""
        pieces = []
        while data := await self.read_some():
            pieces.append(data)
        return b"".join(pieces)

    async def read_some(self) -> bytes:
        """Read what comes next; empty at EOF, also for a FIFO that nobody has opened yet."""
        loop = asyncio.get_running_loop()
        ready = asyncio.Event()
        loop.add_reader(self.fd, ready.set)
        try:
            async with asyncio.timeout(TIMEOUT):
                await ready.wait()
        finally:
            loop.remove_reader(self.fd)
        return os.read(self.fd, 1 << 16)

    def close(self) -> None:
        os.close(self.fd)


def _no_status(_: Exception) -> None:
    return None
