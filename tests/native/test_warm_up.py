"""An agent that warms up before its guest is saved: a pod was there, and the next one starts sooner."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.agent_support import RunningAgent, output
from tests.native.conftest import check_nothing_is_left

pytestmark = [pytest.mark.root, pytest.mark.timeout(60)]


async def test_nothing_is_left_of_the_pod(tmp_path: Path, nsexec_path: Path, busybox_rootfs: Path) -> None:
    (tmp_path / "agent.toml").write_text("warm_up = true\n")
    running = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, "--config", f"{tmp_path}/agent.toml")
    try:
        log = running.log.read_text()
        assert "process ended" in log and "warming up failed" not in log
        assert "warm-up" not in Path("/proc/self/mountinfo").read_text()
        assert not Path("/run/kata-containers/warm-up").exists() and not list(running.state.iterdir())
        assert running.all_children() == running.fork_servers()
        async with running.connect() as agent:
            await agent.create_sandbox()
            container = await agent.create_container("c", running.spec("echo", "first"))
            await container.start()
            assert await output(container.init()) == b"first\n"
    finally:
        running.stop()
    check_nothing_is_left(running, tmp_path)
