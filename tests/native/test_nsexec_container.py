"""Test a container's init process, as seen from inside."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from caisson.agent.base.syscalls import umount2
from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import (
    CAPABILITIES,
    Box,
    children,
    config,
)
from tests.support.unique import unique

pytestmark = pytest.mark.root


def test_sees_only_its_own_processes(box: Box) -> None:
    lines = box.sh("ps; true").splitlines()
    assert [line.split()[0] for line in lines] == ["PID", "1", "2"]


def test_root_is_its_rootfs_and_nothing_of_the_host_is_mounted(box: Box) -> None:
    (box.rootfs / "marker").write_text("inside")
    out = box.sh("cat /marker; cat /proc/self/mountinfo; ls -a /..")
    assert out.startswith("inside")
    mounts = {line.split()[4] for line in out.splitlines() if " - " in line}
    hidden = {"/proc/keys", "/proc/timer_list", "/sys/firmware", "/proc/sys", "/proc/sysrq-trigger", "/proc/irq"}
    assert mounts == {"/", "/proc", "/dev", "/dev/pts", "/sys"} | {path for path in hidden if Path(path).exists()}
    assert "marker" in out.splitlines()


def test_its_mounts_do_not_appear_outside(box: Box) -> None:
    value = config()
    value["linux"]["rootfsPropagation"] = "rshared"
    value["mounts"].append({"destination": "/mnt", "type": "tmpfs", "source": "tmpfs", "options": ["rshared"]})
    assert "shared:" in box.sh("grep ' / ' /proc/self/mountinfo", value)
    assert str(box.path) not in Path("/proc/self/mountinfo").read_text()


@pytest.mark.parametrize(
    ("script", "status"), [("exit 7", 7), ("true", 0), ("kill -9 $$; sleep 1", 137), ("sleep 1000 & exit 3", 3)]
)
def test_exit_status(box: Box, script: str, status: int) -> None:
    # As pid 1 it would be immune to its own signal: this is a child's status, passed on by the shell.
    value = config("sh", "-c", f"sh -c '{script}'; exit $?")
    assert box.run(box.output(value))[0] == status


def test_killed_from_outside(box: Box) -> None:
    async def run() -> int:
        launched = await box.running()
        os.kill(launched.child.pid, signal.SIGKILL)
        return await launched.child.wait()

    assert box.run(run()) == 128 + signal.SIGKILL


def test_streams_are_separate_and_exact(box: Box) -> None:
    data = os.urandom(100_000).hex().encode()
    value = config("sh", "-c", "echo err >&2; cat")
    assert box.run(box.output(value, stdin=data)) == (0, data.decode(), "err\n")


def test_only_stdio_is_open(box: Box) -> None:
    out = box.sh("exec ls /proc/self/fd")
    assert out.split() == ["0", "1", "2", "3"]  # 3 is the directory that ls reads


def test_capabilities_are_exact(box: Box) -> None:
    value = config()
    value["process"]["capabilities"] = {
        "bounding": ["CAP_KILL", "CAP_CHOWN", "CAP_SETUID"],
        "permitted": ["CAP_KILL", "CAP_CHOWN"],
        "effective": ["CAP_KILL"],
        "inheritable": ["CAP_CHOWN"],
        "ambient": ["CAP_CHOWN"],
    }
    value["process"]["user"] = {"uid": 1000, "gid": 1000}
    # execve as non-root: permitted and effective become the ambient set
    assert _capabilities(box.sh("grep Cap /proc/self/status", value)) == {
        "CapInh": 1, "CapPrm": 1, "CapEff": 1, "CapBnd": 1 << 5 | 1 << 0 | 1 << 7, "CapAmb": 1,
    }  # fmt: skip


def test_capabilities_of_root_are_the_bounding_set_and_nothing_is_inheritable(box: Box) -> None:
    bits = 0
    for name in CAPABILITIES:
        bits |= 1 << {"CAP_CHOWN": 0, "CAP_DAC_OVERRIDE": 1, "CAP_FOWNER": 3, "CAP_KILL": 5, "CAP_SETGID": 6,
                      "CAP_SETUID": 7, "CAP_NET_BIND_SERVICE": 10}[name]  # fmt: skip
    assert _capabilities(box.sh("grep Cap /proc/self/status")) == {
        "CapInh": 0, "CapPrm": bits, "CapEff": bits, "CapBnd": bits, "CapAmb": 0,
    }  # fmt: skip


def _capabilities(status: str) -> dict[str, int]:
    return {line.split(":")[0]: int(line.split(":")[1], 16) for line in status.splitlines()}


def test_user_groups_umask_and_limits(box: Box) -> None:
    value = config(
        user={"uid": 1000, "gid": 1001, "additionalGids": [5, 7], "umask": 0o027},
        rlimits=[{"type": "RLIMIT_NOFILE", "soft": 100, "hard": 200}, {"type": "RLIMIT_CORE", "soft": 0, "hard": 0}],
        noNewPrivileges=True,
        cwd="/tmp",
    )
    out = box.sh(
        "id -u; id -g; grep Groups /proc/self/status; umask; ulimit -Sn; ulimit -Hn; ulimit -c; pwd;"
        "grep NoNewPrivs /proc/self/status; echo $HOME",
        value,
    ).split()
    assert out == ["1000", "1001", "Groups:", "5", "7", "0027", "100", "200", "0", "/tmp", "NoNewPrivs:", "1", "/"]


def test_a_hard_limit_beyond_ones_own_is_named(box: Box) -> None:
    value = config(rlimits=[{"type": "RLIMIT_NOFILE", "soft": 1 << 40, "hard": 1 << 40}])
    with pytest.raises(LaunchError, match=r"rlimit RLIMIT_NOFILE: .*operation not permitted"):
        box.run(box.create(value))


def test_signals_are_default_and_unblocked(box: Box) -> None:
    out = box.sh("exec grep -E 'Sig(Blk|Ign|Cgt)' /proc/self/status")
    assert {line.split()[1] for line in out.splitlines()} == {"0" * 16}


def test_session_leader_with_a_host_name_of_its_own(box: Box) -> None:
    assert box.sh("hostname; cut -d' ' -f6 /proc/self/stat").split() == ["box", "1"]


def test_loopback_is_up(box: Box) -> None:
    assert "127.0.0.1" in box.sh("ip addr show lo") or "UP" in box.sh("ip addr show lo")


def test_devices_and_links(box: Box) -> None:
    value = config()
    value["linux"]["devices"] = [
        {"path": "/dev/my", "type": "c", "major": 1, "minor": 5, "fileMode": 0o640, "uid": 7, "gid": 8},
        {"path": "/dev/deep/fifo", "type": "p", "fileMode": 0o600},
    ]
    out = box.sh(
        "cd /dev; stat -c '%n %F %t:%T %a %u:%g' null zero full random urandom tty my deep/fifo;"
        "for l in ptmx fd stdin stdout stderr; do readlink $l; done",
        value,
    )
    device = "character special file"
    assert out.splitlines()[:13] == [
        *(f"{name} {device} {number} 666 0:0" for name, number in
          (("null", "1:3"), ("zero", "1:5"), ("full", "1:7"), ("random", "1:8"), ("urandom", "1:9"), ("tty", "5:0"))),
        f"my {device} 1:5 640 7:8",
        "deep/fifo fifo 0:0 600 0:0",
        "pts/ptmx", "/proc/self/fd", "/proc/self/fd/0", "/proc/self/fd/1", "/proc/self/fd/2",
    ]  # fmt: skip


def test_a_mount_takes_the_place_of_a_device(box: Box) -> None:
    value = config()
    value["mounts"] += [
        {"destination": "/dev/random", "type": "bind", "source": "/dev/urandom", "options": ["bind"]},
        {"destination": "/dev/full", "type": "tmpfs", "source": "tmpfs"},
    ]
    out = box.sh("stat -c '%F %t:%T' /dev/random /dev/full; grep -c ' /dev/full tmpfs' /proc/mounts", value)
    assert out.splitlines() == ["character special file 1:9", "directory 0:0", "1"]


def test_null_stdio_is_the_containers_own(box: Box) -> None:
    value = config("sh", "-c", "[ $(stat -L -c %d /proc/self/fd/0) = $(stat -c %d /dev/null) ]")

    async def run() -> int:
        launched = await box.create(value)  # its stdio is this machine's /dev/null
        await box.start(launched)
        return await launched.child.wait()

    assert box.run(run()) == 0


def test_masked_and_readonly_paths(box: Box) -> None:
    (box.rootfs / "secret").write_text("secret")
    (box.rootfs / "hidden").mkdir()
    (box.rootfs / "hidden" / "file").write_text("secret")
    value = config()
    value["linux"]["maskedPaths"] += ["/secret", "/hidden"]
    value["linux"]["readonlyPaths"] += ["/etc"]
    script = (
        "cat /secret; ls /hidden; touch /hidden/x || echo a; echo 1 >/proc/sys/kernel/pid_max || echo b;"
        "touch /etc/x || echo c; touch /ok"
    )
    out = box.sh(f"exec 2>/dev/null; {script}", value)
    assert out.split() == ["a", "b", "c"]


def test_readonly_root(box: Box) -> None:
    value = config(cwd="/made/for/it")
    value["root"]["readonly"] = True
    value["mounts"].append({"destination": "/tmp", "type": "tmpfs", "source": "tmpfs", "options": ["mode=1777"]})
    assert box.sh("pwd; touch /x 2>/dev/null || echo refused; touch /tmp/x && echo fine", value).split() == [
        "/made/for/it", "refused", "fine",
    ]  # fmt: skip


def test_the_root_as_a_readonly_path(box: Box) -> None:
    """As with runc: it is not silently left writable."""
    value = config()
    value["linux"]["readonlyPaths"] += ["/."]
    assert box.sh("touch /x 2>/dev/null || echo refused; touch /dev/x && echo fine", value).split() == [
        "refused", "fine",
    ]  # fmt: skip


def test_a_readonly_tmpfs_still_gets_its_mount_points(box: Box) -> None:
    value = config()
    value["mounts"][1]["options"].append("ro")
    assert box.sh("touch /dev/x 2>/dev/null || echo refused; echo >/dev/null; ls -d /dev/pts", value).split() == [
        "refused", "/dev/pts",
    ]  # fmt: skip


def test_bind_mounts(box: Box) -> None:
    source = box.path / "source"
    (source / "sub").mkdir(parents=True)
    (source / "file").write_text("content")
    value = config()
    value["mounts"] += [
        {"destination": "/data", "type": "bind", "source": str(source), "options": ["rbind", "ro", "nosuid"]},
        {"destination": "/etc/one/file", "type": "bind", "source": "source/file", "options": ["bind"]},
    ]
    out = box.sh("cat /data/file /etc/one/file; touch /data/x 2>/dev/null || echo ro; grep /data /proc/mounts", value)
    assert out.startswith("contentcontentro\n")
    assert {"ro", "nosuid"} <= set(out.split()[-3].split(","))
    assert (source / "file").read_text() == "content"


def test_sysctl_of_its_namespaces(box: Box) -> None:
    value = config()
    value["linux"]["sysctl"] = {"net.ipv4.ip_forward": "1", "kernel.shm_rmid_forced": "1", "kernel.domainname": "dom"}
    names = "net/ipv4/ip_forward kernel/shm_rmid_forced kernel/domainname"
    assert box.sh(f"cd /proc/sys; cat {names}", value).split() == ["1", "1", "dom"]


def test_sysctl_of_the_guest_is_refused(box: Box) -> None:
    value = config()
    value["linux"]["sysctl"] = {"kernel.core_pattern": "|/evil"}
    with pytest.raises(SpecError, match=r"would change the whole machine|is not in a separate kernel namespace"):
        box.run(box.create(value))


def test_a_cgroup_namespace_has_the_containers_cgroup_as_its_root(box: Box) -> None:
    from caisson.agent.libcontainer.cgroups import HierarchyV2
    from caisson.agent.libcontainer.config.resources import Resources

    hierarchy = HierarchyV2.find()
    assert hierarchy is not None
    cgroup = hierarchy.create(unique("caisson-test"))
    try:
        cgroup.apply(Resources())
        value = config(
            "sh",
            "-c",
            "grep ^0: /proc/self/cgroup; grep -c . /sys/fs/cgroup/cgroup.procs; mknod /tmp/k c 1 11; cat /tmp/k 2>&1",
        )
        value["process"]["capabilities"] = {
            name: [*CAPABILITIES, "CAP_MKNOD"] for name in ("bounding", "effective", "permitted")
        }
        value["linux"]["namespaces"].append({"type": "cgroup"})
        value["mounts"].append(
            {"destination": "/sys/fs/cgroup", "type": "cgroup", "source": "cgroup", "options": ["ro", "nosuid"]}
        )
        status, out, err = box.run(box.output(value, cgroup=cgroup))
        assert out.splitlines()[:2] == ["0::/", "2"], (status, out, err)
        assert "Operation not permitted" in out  # /dev/kmsg is not allowed
    finally:
        box.run(cgroup.delete())


def test_user_namespace(box: Box) -> None:
    value = config()
    value["linux"]["namespaces"].append({"type": "user"})
    for kind in ("uidMappings", "gidMappings"):
        value["linux"][kind] = [{"containerID": 0, "hostID": 100000, "size": 65536}]
    value["linux"]["maskedPaths"] = []
    value["process"]["user"] = {"uid": 5, "gid": 6, "additionalGids": [7]}
    out = box.sh("id -u; id -g; cat /proc/self/uid_map; stat -c %t:%T /dev/null", value).split()
    assert out == ["5", "6", "0", "100000", "65536", "1:3"]


def test_time_namespace_with_offsets(box: Box) -> None:
    value = config()
    value["linux"]["namespaces"].append({"type": "time"})
    value["linux"]["timeOffsets"] = {"boottime": {"secs": 1_000_000}}
    assert float(box.sh("cut -d' ' -f1 /proc/uptime", value)) > 1_000_000


def test_joins_namespaces_by_path(box: Box) -> None:
    async def run() -> tuple[int, str, str]:
        first = await box.running()
        value = config("sh", "-c", "cat /proc/1/comm; hostname")
        value["hostname"] = ""
        procfs, empty = box.path / "proc", box.path / "empty"
        procfs.mkdir()
        empty.mkdir()
        pause = await box.launcher.pause(str(procfs), str(empty), {})
        join = {"pid": f"/proc/{pause.pid}/ns/pid", "uts": f"/proc/{first.child.pid}/ns/uts"}
        try:
            made_there = await box.output(value, join=join)
            assert made_there == await box.output(value, join=join, procfs=str(procfs))
            return made_there
        finally:
            os.kill(pause.pid, signal.SIGKILL)
            assert await pause.wait() == 137
            umount2(procfs)

    assert box.run(run()) == (0, "pause\nbox\n", "")


def test_log_lines_name_stage_and_pid(box: Box) -> None:
    box.sh("true")
    assert any(line.startswith("box debug nsexec-0[") for line in box.lines)
    assert any("nsexec-2[1]: init: closing the pipe" in line for line in box.lines)


def test_a_created_container_that_is_killed_cannot_be_started(box: Box) -> None:
    async def run() -> None:
        launched = await box.create(config())
        os.kill(launched.child.pid, signal.SIGKILL)
        await box.start(launched)

    with pytest.raises(LaunchError, match=r"init|container that has stopped"):
        box.run(run())


def test_starting_twice(box: Box) -> None:
    async def run() -> None:
        launched = await box.running()
        await box.start(launched)

    with pytest.raises(LaunchError, match=r"started before|already running"):
        box.run(run())


def test_no_child_is_left_after_a_container(box: Box) -> None:
    box.sh("true")
    assert children() == []
