"""Provide one docker for all shim tests that need a VM, and a containerd of our own for the rest."""

from __future__ import annotations

import os
import shutil
import signal
import tempfile
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from caisson.agent.shim.bundle import TaskBundle
from tests.native.conftest import busybox_rootfs, nsexec_path
from tests.shim.engine import Engine, engine, unmount
from tests.shim.fake_containerd import FakeContainerd
from tests.shim.native_machines import stop
from tests.support.poll import until

__all__ = ["busybox_rootfs", "nsexec_path"]


@pytest.fixture(scope="session")
def docker() -> Iterator[Engine]:
    """Start docker with our runtime, alongside runc."""
    with engine() as made:
        yield made
        assert made.vms() == [] and made.mounts() == []


@pytest.fixture
async def fake(nsexec_path: Path, busybox_rootfs: Path) -> AsyncIterator[FakeContainerd]:
    """Start a containerd of our own.  Tests delete what they create: nothing of a pod may be left."""
    place = Path(tempfile.mkdtemp(prefix="cs-"))  # short, for sockets
    try:
        async with FakeContainerd(place, nsexec_path, busybox_rootfs) as containerd:
            yield containerd
            # A pod's teardown continues after the response to its last call; containerd's `delete` waits for it.
            await until(lambda: not list(place.glob("agents/*/pid")), "the end of the agents")
            await until(lambda: not list(place.glob("run-pods/*")), "the end of the pods' directories")
            assert str(place) not in Path("/proc/self/mountinfo").read_text()
    finally:
        for path in place.glob("bundles/*"):  # left by failed tests
            record = TaskBundle(path, path.name).read()
            if record is not None and record.shim.alive:
                os.kill(record.shim.pid, signal.SIGTERM)
        for agent in place.glob("agents/*"):
            stop(agent)
        unmount(place)
        shutil.rmtree(place, ignore_errors=True)  # an exiting shim removes its record meanwhile
        assert not place.exists()
