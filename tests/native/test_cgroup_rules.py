"""Test guarantees of containers' cgroups, through the agent's API (v1 and v2) and the OCI command line alike."""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from caisson.agent.client import AgentError
from tests.native.agent_support import RunningAgent
from tests.native.conftest import check_nothing_is_left
from tests.native.living import ByAgent, ByCommand, Living, cgroups, counted, spec
from tests.native.oci_support import OURS, Oci, become_subreaper, reaping
from tests.native.test_nested_cgroups import LEVELS, nest
from tests.support.poll import until

pytestmark = pytest.mark.root


@pytest.fixture(params=["agent-v1", "agent-v2", "command"])
async def living(
    request: pytest.FixtureRequest, tmp_path: Path, nsexec_path: Path, front_path: Path, busybox_rootfs: Path
) -> AsyncIterator[Living]:
    """Provide a driver that creates containers; fail if anything is left behind."""
    if request.param == "command":
        become_subreaper()
        oci = Oci(OURS, tmp_path / "root", nsexec_path, front_path)
        with reaping():
            yield ByCommand(oci, tmp_path / "bundle", busybox_rootfs)
            oci.clear()
        return
    agent = RunningAgent(tmp_path, nsexec_path, busybox_rootfs, "--cgroup", request.param.removeprefix("agent-"))
    async with agent.connect() as client:
        yield ByAgent(agent, client)
    agent.stop()
    check_nothing_is_left(agent, tmp_path)


async def test_every_hierarchy_from_the_first_instruction(living: Living) -> None:
    words = ("/bin/sh", "-c", "cat /proc/self/cgroup >/tmp/first; exec sleep 1000")
    await living.begin(spec(living, *words, without=("cgroup",)))
    await until(lambda: Path(f"/proc/{living.pid}/comm").read_text() == "sleep\n", "its program")
    own = cgroups(living)
    assert own.keys() == {""} or {"memory", "cpu", "cpuacct", "devices", "pids", "freezer"} <= own.keys()
    outside = Path(f"/proc/{living.pid}/cgroup").read_text()
    assert await living.sh("cat /tmp/first") == (0, outside, "")
    assert await living.sh("cat /proc/self/cgroup") == (0, outside, "")
    await living.remove()
    assert not any(path.exists() for path in own.values())


async def test_a_fork_bomb_in_an_exec_counts(living: Living) -> None:
    try:
        await living.begin(spec(living, pids={"limit": 12}))
    except AgentError as error:
        pytest.skip(str(error))  # this machine's cgroup v2 hierarchy may lack it
    own = cgroups(living)
    directory = own.get("pids", own.get(""))
    assert directory is not None
    status, _, err = await living.sh("i=0; while [ $i -lt 30 ]; do sleep 1000 >/dev/null 2>&1 & i=$((i+1)); done")
    assert status != 0 and "can't fork" in err
    assert int((directory / "pids.current").read_text()) <= 12


async def test_a_process_60_levels_below_is_seen_and_ended(living: Living) -> None:
    await living.begin(spec(living))
    own = counted(living)
    pid = await living.exec("/bin/sleep", "1000")
    deep = nest(own, LEVELS)
    with open("cgroup.procs", "w", opener=lambda name, flags: os.open(name, flags, dir_fd=deep)) as procs:
        procs.write(str(pid))
    os.close(deep)
    assert sorted(await living.pids()) == sorted([living.pid, pid])
    await living.signal_all(signal.SIGUSR1)  # its init has no handler, and does not receive it
    await until(lambda: not is_alive(pid), "the process below to end")
    assert await living.pids() == [living.pid]
    another = await living.exec("/bin/sleep", "1000")
    await living.signal_all(signal.SIGKILL)
    await until(lambda: not is_alive(another) and not is_alive(living.pid), "all to end")
    await living.remove()
    assert not own.exists()


async def test_exec_joins_the_first_process_where_the_cgroup_was_divided(living: Living) -> None:
    """As systemd and container engines do: all processes move into a child cgroup, which then gets controllers."""
    await living.begin(spec(living, without=("cgroup",)))
    own = cgroups(living).get("")
    if own is None:
        pytest.skip("cgroup v1 allows processes in any cgroup")
    leaf = own / "init.scope"
    leaf.mkdir()
    for pid in await living.pids():
        (leaf / "cgroup.procs").write_text(str(pid))
    (own / "cgroup.subtree_control").write_text(f"+{(own / 'cgroup.controllers').read_text().split()[0]}")
    for _ in range(2):
        status, out, _ = await living.sh("grep ^0: /proc/self/cgroup")
        assert status == 0 and out.endswith("/init.scope\n")
    await living.remove()
    assert not own.exists()


async def test_a_paused_container_stands_still(living: Living) -> None:
    script = "mkfifo /tmp/in; exec 3<>/tmp/in; : >/tmp/ready; while read line <&3; do echo $line >>/tmp/out; done"
    await living.begin(spec(living, "/bin/sh", "-c", script))
    inside = Path(f"/proc/{living.pid}/root/tmp")
    await until((inside / "ready").exists, "the program")
    await living.pause()
    with (inside / "in").open("wb") as fifo:
        fifo.write(b"it\n")
    with pytest.raises(AssertionError, match="the program to go on"):
        await until((inside / "out").exists, "the program to go on", timeout=0.2)
    await living.resume()
    await until((inside / "out").exists, "the program to go on")
    await living.pause()
    await living.remove()
    assert not is_alive(living.pid)


@pytest.mark.parametrize("access", ["ro", "rw"])
@pytest.mark.parametrize("namespace", [True, False])
async def test_the_containers_own_cgroup_filesystem(living: Living, namespace: bool, access: str) -> None:
    """CVE-2023-25809: read-only in every line, and nothing above the container's own cgroup is visible."""
    value = spec(living, without=() if namespace else ("cgroup",))
    options = [access, "nosuid", "nodev", "noexec", "relatime"]
    mounts = [one for one in value["mounts"] if one["destination"] != "/sys/fs/cgroup"]
    own = {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": options}
    value["mounts"] = [*mounts, own]
    await living.begin(value)
    place = "/sys/fs/cgroup/pids" if "pids" in cgroups(living) else "/sys/fs/cgroup"
    status, out, _ = await living.sh(f"""
        grep ' /sys/fs/cgroup' /proc/mounts; echo --
        cat {place}/cgroup.procs | wc -l; echo --
        mkdir {place}/new 2>&1 && rmdir {place}/new; echo --
        mkdir /sys/fs/cgroup/new 2>&1 && rmdir /sys/fs/cgroup/new; echo --
        ls /sys/fs/cgroup/release_agent /sys/fs/cgroup/*/release_agent 2>/dev/null; echo --
        mkdir -p /tmp/m; mount -t cgroup -o pids none /tmp/m 2>&1; mount -t cgroup2 none /tmp/m 2>&1; true""")
    assert status == 0
    lines, count, below, above, release, mount = out.split("--\n")
    for line in map(str.split, lines.splitlines()):
        assert {access, "nosuid", "nodev", "noexec"} <= set(line[3].split(",")), line
    assert 1 <= int(count) <= 5  # the container's processes only
    assert ("Read-only file system" in below) is (access == "ro"), below
    assert ("Read-only file system" in above) is (access == "ro"), above
    assert release == ""
    # CVE-2022-0492: a hierarchy that a container mounts itself would be writable.
    assert mount.count("permission denied") + mount.count("Operation not permitted") == 2, mount


def is_alive(pid: int) -> bool:
    """Return whether this process exists and has not exited."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False
