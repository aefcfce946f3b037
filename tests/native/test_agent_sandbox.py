"""Test the sandbox with a test launcher, for what real containers do not do on demand: be slow."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.base.errors import FailedPrecondition, NotFound, Timeout
from caisson.agent.base.log import Log
from caisson.agent.base.syscalls import MNT_DETACH, umount2
from caisson.agent.libcontainer.config.process import Rlimit
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process.launch import Launch, Launched
from caisson.agent.model.reaper import Child
from caisson.agent.model.sandbox import Sandbox

pytestmark = pytest.mark.root
SPEC = Spec.from_json({"ociVersion": "1.2.0", "root": {"path": "/r"}, "process": {"args": ["x"], "cwd": "/"}})


class ProcessLauncher:
    """Creates containers whose creation and exit the test triggers."""

    def __init__(self) -> None:
        self.inits: dict[str, Child] = {}
        self.specs: dict[str, Spec] = {}
        self.decided = asyncio.Event()
        self.decided.set()

    async def filter(self, profile: object) -> bytes:
        return b""

    async def create(self, spec: Spec, launch: Launch, **rest: Any) -> Launched:
        container_id = launch.container_id
        await self.decided.wait()
        self.specs[container_id] = spec
        if container_id.startswith("bad"):
            raise LaunchError("it was not meant to be")
        pid = os.posix_spawn("/bin/sleep", ["sleep", "1000"], {})  # noqa: ASYNC221 - it does not wait
        self.inits[container_id] = Child(pid)
        return Launched(self.inits[container_id], None, os.pidfd_open(pid))

    def ends(self, container_id: str) -> None:
        """Make a killed init exit."""
        child = self.inits.pop(container_id)
        _, status = os.waitpid(child.pid, 0)
        child._end(128 - os.waitstatus_to_exitcode(status))


class Setting:
    """A running sandbox with such a launcher."""

    def __init__(self, state: Path) -> None:
        self.state = state
        self.launcher = ProcessLauncher()
        self.sandbox = Sandbox(self.launcher, None, state, Log("fatal"), open_files=(1024, 4096))  # type: ignore[arg-type]


@pytest.fixture
def setting(tmp_path: Path) -> Iterator[Setting]:
    """Fail if a mount or process is left; also clean up after a failed test."""
    setting = Setting(tmp_path / "state")
    yield setting
    left = [line.split()[4] for line in Path("/proc/self/mountinfo").read_text().splitlines() if str(tmp_path) in line]
    for mount in left:
        umount2(mount, MNT_DETACH)
    processes = list(setting.launcher.inits.items())
    for name, child in processes:
        os.kill(child.pid, signal.SIGKILL)
        setting.launcher.ends(name)
    assert (left, processes) == ([], [])


async def settled(task: asyncio.Future[Any]) -> asyncio.Future[Any]:
    """Return a task that has run as far as it can, and waits."""
    for _ in range(50):
        await asyncio.sleep(0)
    assert not task.done()
    return task


async def test_a_removal_that_takes_too_long_is_told_in_time_and_goes_on(setting: Setting) -> None:
    sandbox, launcher = setting.sandbox, setting.launcher
    await sandbox.start("", "")
    await sandbox.create("slow", "", SPEC)
    with pytest.raises(Timeout, match=r"not removed within 0\.05 s"):
        await sandbox.remove("slow", 0.05)
    assert sandbox.container("slow").status == "running"  # it still exists
    await sandbox.create("other", "", SPEC)  # and blocks nobody
    removal = await settled(asyncio.ensure_future(sandbox.remove("other")))
    launcher.ends("other")
    await removal
    again = await settled(asyncio.ensure_future(sandbox.remove("slow")))
    launcher.ends("slow")
    await again
    for name in ("slow", "other"):
        with pytest.raises(NotFound):
            sandbox.container(name)
    await sandbox.destroy()
    assert list(setting.state.iterdir()) == []


async def test_removals_of_one_container_at_the_same_time(setting: Setting) -> None:
    await setting.sandbox.start("", "")
    await setting.sandbox.create("box", "", SPEC)
    removals = [await settled(asyncio.ensure_future(setting.sandbox.remove("box"))) for _ in range(3)]
    removals[0].cancel()  # its caller is gone
    setting.launcher.ends("box")
    assert await asyncio.gather(*removals[1:]) == [None, None]
    with pytest.raises(NotFound, match="container box: not found"):
        await setting.sandbox.remove("box")
    await setting.sandbox.destroy()


async def test_an_end_waits_for_what_is_in_the_making_and_lets_nothing_new_in(setting: Setting) -> None:
    sandbox, launcher = setting.sandbox, setting.launcher
    await sandbox.start("pod", "")
    launcher.decided.clear()
    made = await settled(asyncio.ensure_future(sandbox.create("made", "", SPEC)))
    failed = await settled(asyncio.ensure_future(sandbox.create("bad", "", SPEC)))
    end = await settled(asyncio.ensure_future(sandbox.destroy()))
    assert not sandbox.running
    with pytest.raises(FailedPrecondition, match="the sandbox is not running"):
        await sandbox.create("new", "", SPEC)
    launcher.decided.set()
    await made
    with pytest.raises(LaunchError):
        await failed
    await settled(end)
    launcher.ends("made")
    await end
    assert list(setting.state.iterdir()) == []
    await sandbox.start("pod", "")
    await sandbox.destroy()


async def test_a_container_that_cannot_be_removed_keeps_the_sandbox_but_no_other(
    setting: Setting, monkeypatch: pytest.MonkeyPatch
) -> None:
    sandbox = setting.sandbox
    await sandbox.start("", "")
    stuck = await sandbox.create("stuck", "", SPEC)
    await sandbox.create("fine", "", SPEC)

    async def fail() -> None:
        raise OSError(16, "busy")

    with monkeypatch.context() as patch:
        patch.setattr(stuck, "remove", fail)
        end = await settled(asyncio.ensure_future(sandbox.destroy()))
        setting.launcher.ends("fine")
        with pytest.raises(OSError, match="busy"):
            await end
    assert sandbox.running
    assert sandbox.container("stuck") is stuck
    with pytest.raises(NotFound):
        sandbox.container("fine")
    end = await settled(asyncio.ensure_future(sandbox.destroy()))
    setting.launcher.ends("stuck")
    await end
    assert list(setting.state.iterdir()) == []


async def test_a_failed_start_is_as_if_it_had_not_been_tried(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    sandbox = setting.sandbox
    with monkeypatch.context() as patch:
        patch.setattr(
            "caisson.agent.base.syscalls.unshare", lambda flags: (_ for _ in ()).throw(OSError(1, "not permitted"))
        )
        with pytest.raises(FailedPrecondition, match=r"failed to create namespace: .*not permitted"):
            await sandbox.start("pod", "name")
    assert not sandbox.running
    assert list(setting.state.iterdir()) == []
    await sandbox.start("pod", "name")
    await sandbox.destroy()


async def test_an_end_that_is_broken_off_goes_on(setting: Setting) -> None:
    await setting.sandbox.start("", "")
    await setting.sandbox.create("box", "", SPEC)
    end = await settled(asyncio.ensure_future(setting.sandbox.destroy()))
    end.cancel()
    await asyncio.wait([end])
    assert not setting.sandbox.running
    setting.launcher.ends("box")
    await setting.sandbox.start("next", "")  # waits for that to end
    assert [path.name for path in setting.state.iterdir()] == ["next"]
    await setting.sandbox.destroy()


async def test_open_files_are_limited_as_usual_unless_the_spec_says_otherwise(setting: Setting) -> None:
    limits = (Rlimit("RLIMIT_CORE", soft=0, hard=0), Rlimit("RLIMIT_NOFILE", soft=7, hard=8))
    assert SPEC.process is not None
    asked = SPEC.but(process=SPEC.process.but(rlimits=limits))

    await setting.sandbox.start("", "")
    for name, spec in (("usual", SPEC), ("asked", asked)):
        await setting.sandbox.create(name, "", spec)
    seen = {name: spec.process and spec.process.rlimits for name, spec in setting.launcher.specs.items()}
    assert seen == {"usual": (Rlimit("RLIMIT_NOFILE", soft=1024, hard=4096),), "asked": limits}
    end = await settled(asyncio.ensure_future(setting.sandbox.destroy()))
    for name in seen:
        setting.launcher.ends(name)
    await end
