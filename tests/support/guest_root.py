"""Run programs on a guest's own root file system with full privileges, for tests that inspect the guest itself."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from caisson.agent import client
from caisson.agent.base.syscalls import CAPABILITIES
from caisson.agent.client import specs
from caisson.proto.caisson import caisson_pb2

#: Where the container has the guest's root mounted.
ROOTFS = "/run/caisson-tests/root"

PATH = "PATH=/usr/sbin:/usr/bin:/sbin:/bin"

#: Bytes sent at a time.
CHUNK = 1 << 20


def document() -> dict[str, Any]:
    """Return the spec of a privileged container on the guest's root, with the guest's devices."""
    spec = specs.container_document(ROOTFS, scratch=("/tmp", "/run", "/var"))
    of_the_guest = [{"destination": "/dev", "type": "bind", "source": "/dev", "options": ["rbind", "rw"]}]
    spec["mounts"] = of_the_guest + [one for one in spec["mounts"] if not one["destination"].startswith("/dev")]
    for mount in spec["mounts"]:
        mount["options"] = [option for option in mount["options"] if option != "ro"]
    spec["process"]["noNewPrivileges"] = False
    spec["process"]["capabilities"] = {kind: list(CAPABILITIES) for kind in ("bounding", "effective", "permitted")}
    spec["linux"] |= {
        "maskedPaths": [],
        "readonlyPaths": [],
        "resources": {"devices": [{"allow": True, "access": "rwm"}]},
    }
    return spec


async def container(agent: client.Agent, name: str, keep_alive: Sequence[str]) -> client.Container:
    """Start such a container; its init does nothing until it is killed."""
    spec = document()
    spec["process"]["args"] = list(keep_alive)
    await agent.create_sandbox()
    storage = caisson_pb2.Storage(driver="bind", source="/", fstype="bind", mount_point=ROOTFS, options=["bind"])
    made = await agent.create_container(name, spec, [storage])
    await made.start()
    return made


def python_of(manifest: Mapping[str, Any]) -> str:
    """Return the path of a guest's interpreter."""
    names = [re.fullmatch(r"(python3\.\d+)-minimal", package["name"]) for package in manifest["packages"]]
    return f"/usr/bin/{next(name[1] for name in names if name)}"


@dataclass(frozen=True)
class Done:
    """The result of a program."""

    status: int
    stdout: bytes
    stderr: bytes


async def run(
    container: client.Container,
    *words: str,
    stdin: bytes = b"",
    env: Sequence[str] = (),
    cwd: str = "/",
    show: Callable[[bytes], None] = lambda data: None,
) -> Done:
    """Run a program to completion; ``show`` gets its output as it arrives."""
    process = await container.exec(list(words), env=[PATH, "HOME=/tmp", *env], cwd=cwd)

    async def feed() -> None:
        for at in range(0, len(stdin), CHUNK):
            await process.write(stdin[at : at + CHUNK])
        await process.close_stdin()

    async def collect(stream: AsyncIterator[bytes]) -> bytes:
        found = []
        async for data in stream:
            found.append(data)
            show(data)
        return b"".join(found)

    work: list[Awaitable[Any]] = [feed(), collect(process.stdout()), collect(process.stderr())]
    _, stdout, stderr = await asyncio.gather(*work)
    return Done(await process.wait(), stdout, stderr)
