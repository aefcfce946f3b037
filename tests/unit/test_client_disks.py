"""Test a disk hot-plugged for a container: the host waits while the guest does not see it yet."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from caisson.agent.client import AgentError, foreground
from caisson.agent.client.run_specs import SharedVolume
from caisson.agent.client.specs import container_document
from caisson.agent.rpc.codes import StatusCode


class SlowGuest:
    """Its disk appears at the third request."""

    def __init__(self, code: StatusCode = StatusCode.DEADLINE_EXCEEDED) -> None:
        self.requests: list[Any] = []
        self.files: dict[str, bytes] = {}
        self._code = code
        self.rpc = SimpleNamespace(CopyFile=self.copy_file)

    async def copy_file(self, request: Any) -> None:
        self.files[request.path] = request.data

    async def create_container_reporting(self, container_id: str, document: Any, storages: Any) -> list[str]:
        self.requests.append((container_id, document, storages))
        if len(self.requests) < 3:
            raise AgentError(self._code, "Timeout reached after 3s waiting for device 10/00")
        return []

    async def create_sandbox(self) -> bool:
        return True

    def container(self, container_id: str) -> str:
        return container_id


def test_a_disk_is_waited_for() -> None:
    guest: Any = SlowGuest()
    document = container_document("/x")
    volumes = [SharedVolume("virtiofs", "tag", "/v", writable=False)]
    asyncio.run(foreground.create_on_disk(guest, "web", document, "10/00", "squashfs", volumes))
    name, sent, mounted = guest.requests[-1]
    assert len(guest.requests) == 3 and name == "web"
    disk, *_, root, volume = mounted
    assert (disk.driver, disk.source, disk.fstype) == ("blk", "10/00", "squashfs") and "ro" in disk.options
    assert root.fstype == "overlay" and f"lowerdir={disk.mount_point}" in root.options
    assert sent["root"]["path"] == root.mount_point
    mounts = {mount["destination"]: mount for mount in sent["mounts"]}
    assert (volume.fstype, volume.source) == ("virtiofs", "tag") and "ro" in volume.options
    assert mounts["/v"]["source"] == volume.mount_point and "ro" in mounts["/v"]["options"]
    assert [one.rpartition("/")[2] for one in guest.files] == ["hosts", "hostname", "resolv.conf"]
    assert all(mounts[f"/etc/{one.rpartition('/')[2]}"]["source"] == one for one in guest.files)


def test_another_refusal_is_told_at_once() -> None:
    guest: Any = SlowGuest(StatusCode.INVALID_ARGUMENT)
    with pytest.raises(AgentError):
        asyncio.run(foreground.create_on_disk(guest, "web", container_document("/x"), "10/00", "squashfs"))
    assert len(guest.requests) == 1
