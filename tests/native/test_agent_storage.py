"""Test storages that this machine can provide."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.log import Log
from caisson.agent.base.mountinfo import mount_points
from caisson.agent.base.syscalls import MNT_DETACH, umount2
from caisson.agent.client import Agent, AgentError
from caisson.agent.guest.blockdevices import BlockDevices
from caisson.agent.guest.storage import Storage, Storages, ephemeral
from caisson.agent.rpc.codes import StatusCode as Code
from caisson.proto.kata1 import agent_pb2
from tests.native.agent_support import RunningAgent, refused

pytestmark = pytest.mark.root


@pytest.fixture
def place(tmp_path: Path, agent: RunningAgent) -> Iterator[Path]:
    """Provide a directory for mounts; at the end nothing is mounted there, and only what the test created is left."""
    path = tmp_path / "place"
    path.mkdir()
    yield path
    assert str(path) not in Path(f"/proc/{agent.process.pid}/mountinfo").read_text()


def storage(mount_point: Path | str, driver: str = "", **fields: Any) -> Any:
    return agent_pb2.Storage(driver=driver, mount_point=str(mount_point), **fields)


def mounts(agent: RunningAgent, path: Path) -> list[str]:
    """Return the types and options of mounts on a path, in the agent's namespace."""
    found = []
    for line in Path(f"/proc/{agent.process.pid}/mountinfo").read_text().splitlines():
        before, _, after = line.partition(" - ")
        if before.split()[4] == str(path):
            found.append(f"{after.split()[0]} {before.split()[5]}")
    return found


async def create(client: Agent, agent: RunningAgent, *storages: Any, container_id: str = "box") -> None:
    request = agent_pb2.CreateContainerRequest(container_id=container_id, OCI=agent.spec(), storages=storages)
    await client.rpc.CreateContainer(request)


async def test_a_mount_that_nobody_waits_for_is_undone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begun, go_on, done = threading.Event(), threading.Event(), threading.Event()
    make = ephemeral.make_ephemeral

    def make_late(wanted: Storage) -> None:
        begun.set()
        go_on.wait()
        make(wanted)
        done.set()

    monkeypatch.setattr(ephemeral, "make_ephemeral", make_late)
    storages = Storages(BlockDevices(0), Log("error"))
    mounting = asyncio.ensure_future(storages.mount([Storage("ephemeral", "shm", "tmpfs", str(tmp_path / "shm"))]))
    await asyncio.to_thread(begun.wait)
    mounting.cancel()
    await asyncio.sleep(0)
    go_on.set()
    with pytest.raises(asyncio.CancelledError):
        await mounting
    await asyncio.to_thread(done.wait)
    left = mount_points(str(tmp_path))
    for path in left:
        umount2(path, MNT_DETACH)
    assert left == []


async def test_mounted_for_a_container_and_unmounted_with_it(agent: RunningAgent, place: Path) -> None:
    source = place / "source"
    source.mkdir()
    (place / "file").write_text("x")
    wanted = [
        storage(place / "tmp/deep", "blk", source="tmpfs", fstype="tmpfs", options=["nosuid", "size=1m"]),
        storage(place / "tmp/deep/inner", "local-of-no-driver", source=str(source), fstype="bind", options=["ro"]),
        storage(place / "bound", "", source=str(place / "file"), fstype="bind", options=["bind", "rprivate"]),
        storage(
            place / "overlay",
            "mmioblk",
            source="overlay",
            fstype="overlay",
            options=[f"lowerdir={source}:{place}/tmp", "ro"],
        ),
    ]
    wanted[0].driver = "mmioblk"

    async with agent.connect() as client:
        await client.create_sandbox()
        await create(client, agent, *wanted)
        assert mounts(agent, place / "tmp/deep")[0].startswith("tmpfs rw,nosuid")
        assert "ro" in mounts(agent, place / "tmp/deep/inner")[0].split()[1].split(",")
        assert len(mounts(agent, place / "bound")) == len(mounts(agent, place / "overlay")) == 1
        assert (place / "bound").is_file()
        await client.container("box").remove()
        for one in wanted:
            assert mounts(agent, Path(one.mount_point)) == []


async def test_shared_ones_stay_until_the_end_of_the_sandbox(agent: RunningAgent, place: Path) -> None:
    shared = [
        storage(place / "memory", "ephemeral", source="tmpfs", fstype="tmpfs"),
        storage(place / "directory", "local", options=["mode=0750"]),
    ]

    async with agent.connect() as client:
        await client.create_sandbox()
        for name in ("a", "b"):
            await create(client, agent, *shared, container_id=name)
            (place / "directory" / name).write_text(name)
        assert (place / "directory").stat().st_mode & 0o7777 == 0o750
        for name in ("a", "b"):
            await client.container(name).remove()
            assert len(mounts(agent, place / "memory")) == 1
        assert sorted(path.name for path in (place / "directory").iterdir()) == ["a", "b"]
        await client.destroy_sandbox()
        assert not (place / "memory").exists() and not (place / "directory").exists()


async def test_a_container_with_storages_is_removed_by_several_at_once(agent: RunningAgent, place: Path) -> None:
    memory = storage(place / "memory", "mmioblk", source="tmpfs", fstype="tmpfs")

    async with agent.connect() as client:
        await client.create_sandbox()
        for _ in range(5):
            await create(client, agent, memory)
            removals = [client.container("box").remove() for _ in range(3)]
            for done in await asyncio.gather(*removals, client.destroy_sandbox(), return_exceptions=True):
                assert done is None or (isinstance(done, AgentError) and done.code == Code.NOT_FOUND), done
            assert mounts(agent, place / "memory") == []
            await client.create_sandbox()


async def test_of_the_sandbox_itself(agent: RunningAgent, place: Path) -> None:
    request = agent_pb2.CreateSandboxRequest(
        storages=[storage(place / "one", "mmioblk", source="tmpfs", fstype="tmpfs"), storage(place / "bad", "no")]
    )

    async with agent.connect() as client:
        assert (await refused(client.rpc.CreateSandbox(request))) == (
            Code.INVALID_ARGUMENT,
            'Unknown storage driver "no"',
        )
        request.storages[1].CopyFrom(storage(place / "bad", "mmioblk", source="/no/such", fstype="ext4"))
        code, text = await refused(client.rpc.CreateSandbox(request))
        assert (code, text) == (Code.INTERNAL, "Could not resolve symlink for source /no/such")
        assert mounts(agent, place / "one") == []
        del request.storages[1]
        await client.rpc.CreateSandbox(request)
        assert len(mounts(agent, place / "one")) == 1
        await client.destroy_sandbox()


@pytest.mark.parametrize(
    "bad, code, text",
    [
        ({"driver": "no"}, Code.INVALID_ARGUMENT, 'Unknown storage driver "no"'),
        ({"driver": "9p", "fstype": "9p"}, Code.UNKNOWN, "need mount source"),
        ({"driver": "9p", "source": "x"}, Code.UNKNOWN, "need mount FS type"),
        (
            {"driver": "blk", "source": "/dev/no-such", "fstype": "ext4"},
            Code.INVALID_ARGUMENT,
            "invalid device /dev/no",
        ),
        ({"driver": "blk", "source": "zz", "fstype": "ext4"}, Code.INVALID_ARGUMENT, "invalid PCI path zz"),
        (
            {"driver": "nvdimm", "source": "/dev/x", "fstype": "ext4"},
            Code.INVALID_ARGUMENT,
            "invalid nvdimm source path",
        ),
        (
            {"driver": "mmioblk", "source": "/dev/null", "fstype": "ext4"},
            Code.INTERNAL,
            "Could not mount /dev/null to ",
        ),
        ({"driver": "9p", "source": "tag", "fstype": "no-such-fs"}, Code.INTERNAL, "Could not mount tag to "),
        ({"driver": "local", "options": ["mode=9"]}, Code.INVALID_ARGUMENT, "storage "),
        ({"driver": "ephemeral", "fstype": "hugetlbfs"}, Code.INVALID_ARGUMENT, "storage "),
    ],
)
async def test_a_failure_takes_back_what_was_mounted(
    agent: RunningAgent, place: Path, bad: dict[str, Any], code: Code, text: str
) -> None:
    async with agent.connect() as client:
        await client.create_sandbox()
        good = storage(place / "good", "mmioblk", source="tmpfs", fstype="tmpfs")
        found, message = await refused(create(client, agent, good, storage(place / "bad", **bad)))
        assert (found, message[: len(text)]) == (code, text)
        assert mounts(agent, place / "good") == []
        # And so does one in the container itself.
        request = agent_pb2.CreateContainerRequest(container_id="box", OCI=agent.spec("missing"), storages=[good])
        assert "executable file not found" in (await refused(client.rpc.CreateContainer(request)))[1]
        assert mounts(agent, place / "good") == []
        await create(client, agent, good)
        await client.container("box").remove()


async def test_links_on_the_way_are_not_followed(agent: RunningAgent, place: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (place / "link").symlink_to(outside)

    async with agent.connect() as client:
        await client.create_sandbox()
        for target in (place / "link/x", place / "link", f"{place}/../outside"):
            bad = storage(target, "mmioblk", source="tmpfs", fstype="tmpfs")
            code, text = await refused(create(client, agent, bad))
            assert (code, text.split(":")[0]) == (Code.INTERNAL, "Could not create destination mount point")
        assert list(outside.iterdir()) == []
