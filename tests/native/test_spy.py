"""Test a container process that tries to reach the guest through processes being created (tests/native/spy.c)."""

from __future__ import annotations

import asyncio
import signal
import subprocess
from pathlib import Path

import pytest

from caisson.agent.client.specs import DEFAULT_CAPABILITIES
from caisson.agent.libcontainer.plan.capabilities import capability_mask
from caisson.proto.kata1 import oci_pb2
from tests.native.agent_support import RunningAgent, output
from tests.native.test_shared_pids import container, shared

pytestmark = pytest.mark.root


@pytest.fixture(scope="module")
def spy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Provide a directory containing the spy."""
    directory = tmp_path_factory.mktemp("spy")
    source = Path(__file__).with_name("spy.c")
    subprocess.run(
        ["musl-gcc", "-O2", "-Wall", "-Wextra", "-static", "-s", "-o", directory / "spy", source], check=True
    )
    directory.chmod(0o755)
    return directory


#: How many execs, and how many creates, while a spy watches.
EXECS, CREATES = 1000, 40


@pytest.mark.parametrize("kind", ["root", "CAP_SYS_PTRACE"])
async def test_a_process_being_made_gives_no_way_into_the_guest(
    agent: RunningAgent, spy: Path, kind: str
) -> None:  # CVE-2016-9962
    """Root sees the new processes, but is denied all access; with CAP_SYS_PTRACE the kernel denies nothing, but
    there is nothing of the guest's to find: only the container's root and privileges, a socket or pipe, and the
    program, which cannot be written to.
    """
    mask = capability_mask(DEFAULT_CAPABILITIES, "") | capability_mask(["CAP_SYS_PTRACE"], "")
    spec = agent.spec("/mnt/spy", f"{mask:x}")
    spec.Mounts.append(oci_pb2.Mount(destination="/mnt", type="bind", source=str(spy), options=["rbind", "ro"]))
    if kind != "root":
        for name in ("Bounding", "Effective", "Permitted"):
            getattr(spec.Process.Capabilities, name).append(kind)

    async with agent.connect() as client:
        await shared(client)
        watched = await container(client, agent, "watched", "sleep", "1000")
        watcher = await client.create_container("spy", spec)
        await watcher.start()
        said = output(watcher.init())

        async def some() -> None:
            for _ in range(EXECS // 4):
                process = await watched.exec(["true"], env=["PATH=/bin"])
                assert await process.wait() == 0

        async def more(number: int) -> None:
            for _ in range(CREATES // 2):
                made = await container(client, agent, f"made-{number}", "true")
                assert await made.init().wait() == 0
                await made.remove()

        await asyncio.gather(*(some() for _ in range(4)), *(more(number) for number in range(2)))
        await watcher.init().signal(signal.SIGTERM)
        lines = (await said).decode().splitlines()
        await client.destroy_sandbox()
    first, *found, last = lines
    assert first == "ready"
    counted = dict(word.split("=") for word in last.split()[1:])
    assert int(counted["nsexec"]) > 10, "the spy was too slow to see anything"
    assert int(counted["denied"]) > 10 or kind != "root"
    kinds = {line.split()[0] for line in found}
    if kind == "root":
        assert found == [], found
    else:
        assert "exe" in kinds, "the spy could not look"
        assert kinds <= {"empty", "exe", "fd", "maps", "mem"}, found
        assert {line for line in found if line.startswith("empty")} <= {"empty pause root", "empty pause cwd"}
        assert {line.split()[-1] for line in found if line.startswith("fd")} <= {"pipe:", "socket:"}, found
