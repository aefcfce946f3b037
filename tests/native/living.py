"""Drive a running container in two ways: through the agent's API, and with the OCI command line.

Requests are in terms of config.json and a shell, so that a rule of the runtime is one test for both.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Protocol

from caisson.agent.client import Agent, Container
from caisson.agent.client.specs import container_document
from caisson.agent.client.wire_specs import to_wire
from caisson.agent.libcontainer.cgroups import files
from caisson.proto.kata1 import agent_pb2
from tests.native.agent_support import RunningAgent, errors, output, sh
from tests.native.oci_support import Oci
from tests.support.poll import until

NAME = "box"


class Living(Protocol):
    """One container; `pid` is that of its init process."""

    rootfs: Path
    pid: int

    async def begin(self, spec: dict[str, Any]) -> None:
        """Create and start it."""

    async def sh(self, script: str) -> tuple[int, str, str]:
        """Run a shell script in it; return its status and both outputs."""

    async def exec(self, *args: str) -> int:
        """Run another process in it; return its pid."""

    async def pids(self) -> list[int]:
        """List its processes."""

    async def signal_all(self, number: int) -> None:
        """Signal all its processes."""

    async def pause(self) -> None:
        """Pause it."""

    async def resume(self) -> None:
        """Resume it."""

    async def remove(self) -> None:
        """Stop and delete it."""


def spec(living: Living, *args: str, without: tuple[str, ...] = (), **resources: Any) -> dict[str, Any]:
    """Return a configuration with these limits, `without` namespaces of some types."""
    value = container_document(str(living.rootfs), args or ("/bin/sleep", "1000"))
    linux = value["linux"]
    linux["namespaces"] = [one for one in linux["namespaces"] if one["type"] not in without]
    linux["resources"] = resources
    return value


def cgroups(living: Living) -> dict[str, Path]:
    """Return its cgroups on this machine, by controller; cgroup v2 is "", and systemd's named one is omitted."""
    found = {}
    for line in Path(f"/proc/{living.pid}/cgroup").read_text().splitlines():
        _, names, path = line.split(":", 2)
        for name in names.split(","):
            found[name] = Path(f"/sys/fs/cgroup/{name or 'unified'}{path}")
    found.pop("name=systemd", None)
    return {name: path for name, path in found.items() if path.name.endswith(NAME)}


def counted(living: Living) -> Path:
    """Return the one of them in which its processes are counted."""
    found = cgroups(living)
    return found.get("freezer") or found[""]


class ByAgent:
    """Through an agent's API."""

    def __init__(self, agent: RunningAgent, client: Agent) -> None:
        self.rootfs = agent.rootfs
        self.pid = -1
        self._state = agent.state
        self._client = client
        self._container: Container | None = None

    @property
    def container(self) -> Container:
        assert self._container is not None
        return self._container

    async def begin(self, spec: dict[str, Any]) -> None:
        await self._client.create_sandbox()
        self._container = await self._client.ensure_container(NAME, to_wire(spec))
        (file,) = self._state.rglob("state.json")
        self.pid = int(json.loads(file.read_text())["init_process_pid"])

    async def sh(self, script: str) -> tuple[int, str, str]:
        process = await sh(self.container, script)
        out, err = await output(process), await errors(process)
        return await process.wait(), out.decode(), err.decode()

    async def exec(self, *args: str) -> int:
        def others() -> set[int]:
            return set(files.pids_in(str(counted(self)))) - before

        before: set[int] = set()
        before = others()
        await self.container.exec(list(args), env=["PATH=/bin"])
        await until(lambda: len(others()) == 1, "nsexec's own stages to end")
        return others().pop()

    async def pids(self) -> list[int]:
        request = agent_pb2.ListProcessesRequest(container_id=NAME, format="json")
        return list(json.loads((await self._client.rpc.ListProcesses(request)).process_list))

    async def signal_all(self, number: int) -> None:
        await self.container.signal(number)

    async def pause(self) -> None:
        await self._client.rpc.PauseContainer(agent_pb2.PauseContainerRequest(container_id=NAME))

    async def resume(self) -> None:
        await self._client.rpc.ResumeContainer(agent_pb2.ResumeContainerRequest(container_id=NAME))

    async def remove(self) -> None:
        await self.container.remove(timeout=20)


class ByCommand:
    """Through the OCI command line."""

    def __init__(self, oci: Oci, bundle: Path, rootfs: Path) -> None:
        self.rootfs = rootfs
        self.pid = -1
        self._oci = oci
        self._bundle = bundle

    async def begin(self, spec: dict[str, Any]) -> None:
        linux = spec["linux"]
        linux["cgroupsPath"] = f"/caisson-living-{os.getpid()}-{NAME}"
        linux["namespaces"].append({"type": "pid"})  # which an agent gives every container
        spec["process"]["terminal"] = False
        self._bundle.mkdir()
        (self._bundle / "config.json").write_text(json.dumps(spec))
        self.pid = self._oci.running(self._bundle, NAME)

    async def sh(self, script: str) -> tuple[int, str, str]:
        result = self._oci("exec", NAME, "/bin/sh", "-c", f"export PATH=/bin; {script}")
        return result.status, result.out, result.err

    async def exec(self, *args: str) -> int:
        file = self._bundle / "pid"
        result = self._oci.detached("exec", "-d", "--pid-file", str(file), NAME, *args)
        assert result.status == 0, result
        return int(file.read_text())

    async def pids(self) -> list[int]:
        return list(json.loads(self._oci.ok("ps", "--format", "json", NAME)))

    async def signal_all(self, number: int) -> None:
        self._oci.ok("kill", "--all", NAME, str(number))

    async def pause(self) -> None:
        self._oci.ok("pause", NAME)

    async def resume(self) -> None:
        self._oci.ok("resume", NAME)

    async def remove(self) -> None:
        self._oci.ok("delete", "--force", NAME)
