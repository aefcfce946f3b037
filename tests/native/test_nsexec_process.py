"""Test what is set last: the filter, after which a process needs only write and execve, its groups, its hooks."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.config.reader import SpecError
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import Box, config
from tests.native.test_seccomp import NATIVE

pytestmark = pytest.mark.root

PROGRAM = """
#include <unistd.h>
int main(void)
{
	return write(1, "fine\\n", 5) == 5 ? 0 : 1;
}
"""
KEYRING = """
#include <stdio.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(void)
{
	return printf("%ld\\n", syscall(SYS_keyctl, 0, -3, 0)) < 2; /* KEYCTL_GET_KEYRING_ID, KEY_SPEC_SESSION_KEYRING */
}
"""
#: System calls that musl needs to start and end a program that writes; and those that nsexec needs.
NEEDED_CALLS = ["arch_prctl", "set_tid_address", "exit_group", "write", "execve"]
#: Of Linux 4.18 and later: unknown to the profiles of docker 19.03.9 and 20.10.0.
NEWER = [
    "clone3", "close_range", "faccessat2", "fsconfig", "fsmount", "fsopen", "fspick", "io_uring_enter",
    "io_uring_register", "io_uring_setup", "mount_setattr", "move_mount", "open_tree", "openat2", "pidfd_getfd",
    "pidfd_open", "pidfd_send_signal", "process_madvise",
]  # fmt: skip
#: Old ones, denied without CAP_SYS_ADMIN and the like.
PRIVILEGED = [
    "keyctl", "mount", "personality", "pivot_root", "ptrace", "setdomainname", "sethostname", "setns", "umount2",
    "unshare",
]  # fmt: skip


@pytest.fixture
def writer(box: Box) -> str:
    """Provide a program that needs the fewest system calls."""
    (box.path / "writer.c").write_text(PROGRAM)
    target = box.rootfs / "bin/writer"
    subprocess.run(["musl-gcc", "-static", "-O1", "-o", target, box.path / "writer.c"], check=True)
    target.chmod(0o755)
    return "/bin/writer"


def profile(default: str, action: str, names: list[str]) -> dict[str, Any]:
    return {
        "defaultAction": default,
        "architectures": [NATIVE],
        "syscalls": [{"names": names, "action": action}],
    }


@pytest.mark.parametrize("default", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])
async def test_a_filter_need_permit_only_write_and_execve(box: Box, writer: str, default: str) -> None:
    value = config(writer, noNewPrivileges=True)
    value["linux"]["seccomp"] = profile(default, "SCMP_ACT_ALLOW", NEEDED_CALLS)
    assert (await box.output(value)) == (0, "fine\n", "")


@pytest.mark.parametrize("default", ["SCMP_ACT_ERRNO", "SCMP_ACT_KILL_PROCESS"])
async def test_nor_does_that_of_an_exec(box: Box, writer: str, default: str) -> None:
    value = config("sleep", "1000")

    init = await box.running(value)
    filtered = config(noNewPrivileges=True)
    filtered["linux"]["seccomp"] = profile(default, "SCMP_ACT_ALLOW", NEEDED_CALLS)
    spec, join, _ = box.specs[init.child.pid]
    box.specs[init.child.pid] = (spec, join, await box.launcher.filter(Spec.from_json(filtered).linux.seccomp))
    assert (await box.exec(init, {"args": [writer], "noNewPrivileges": True}, value)) == (0, "fine\n", "")


@pytest.mark.parametrize("no_new_privs", [False, True])
@pytest.mark.parametrize("user", [0, 1000])
def test_old_profiles_of_docker(box: Box, user: int, no_new_privs: bool) -> None:
    value = config("sh", "-c", "grep -E 'Seccomp:|NoNewPrivs|CapEff|CapPrm' /proc/self/status")
    value["process"] |= {"noNewPrivileges": no_new_privs, "user": {"uid": user, "gid": user}}
    value["linux"]["seccomp"] = profile("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", [*NEWER, *PRIVILEGED, "sendto"])
    status, out, err = box.run(box.output(value))
    assert (status, err) == (0, "")
    assert dict(line.split() for line in out.splitlines())["Seccomp:"] == "2"

    async def execute() -> tuple[int, str, str]:
        init = await box.running(value | {"process": value["process"] | {"args": ["sleep", "1000"]}})
        return await box.exec(init, {"args": ["grep", "Seccomp:", "/proc/self/status"]}, value)

    assert box.run(execute())[:2] == (0, "Seccomp:\t2\n")


async def test_a_process_that_waits_with_its_filter_has_no_more_capabilities_than_configured(box: Box) -> None:
    value = config("sleep", "1000", user={"uid": 1000, "gid": 1000})
    value["linux"]["seccomp"] = profile("SCMP_ACT_ALLOW", "SCMP_ACT_ERRNO", PRIVILEGED)

    launched = await box.create(value)
    lines = Path(f"/proc/{launched.child.pid}/status").read_text().splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert status["Seccomp"] == "2"
    assert status["CapPrm"] == status["CapEff"] == status["CapBnd"] != "0" * 16


async def test_an_exec_that_fails_after_its_filter_is_reported(box: Box) -> None:
    (box.rootfs / "bin/bad").write_text("#!/no/such/interpreter\n")
    (box.rootfs / "bin/bad").chmod(0o755)
    value = config("/bin/bad", noNewPrivileges=True)
    value["linux"]["seccomp"] = profile("SCMP_ACT_ERRNO", "SCMP_ACT_ALLOW", ["execve", "write"])
    with pytest.raises(LaunchError, match=r"^exec /bin/bad: no such file or directory$"):
        await box.output(value)


@pytest.mark.parametrize("count", [33, 20_000, 65_536])
def test_supplementary_groups_up_to_the_kernels_limit(box: Box, count: int) -> None:
    groups = list(range(1000, 1000 + count))
    value = config(user={"uid": 1000, "gid": 1000, "additionalGids": groups})
    assert [int(gid) for gid in box.sh("grep Groups /proc/self/status", value).split()[1:]] == groups


async def test_more_groups_than_that_are_rejected(box: Box) -> None:
    with pytest.raises(SpecError, match=r"process\.user\.additionalGids: must be at most 65536, not 65537"):
        await box.output(config(user={"uid": 1, "additionalGids": list(range(65_537))}))


def _with_hook(box: Box, script: str, **hook: Any) -> dict[str, Any]:
    value = config("true", env=["PATH=/bin", "COLOUR=green"])
    value["mounts"].append({"destination": "/out", "type": "bind", "source": str(box.path), "options": ["rbind"]})
    value["hooks"] = {"startContainer": [{"path": "/bin/sh", "args": ["sh", "-c", script], **hook}]}
    return value


@pytest.mark.parametrize(("env", "expected"), [([], "green\n"), (["PATH=/bin"], "\n")])
async def test_a_start_container_hook_without_env_gets_that_of_the_process(
    box: Box, env: list[str], expected: str
) -> None:
    assert (await box.output(_with_hook(box, "echo $COLOUR > /out/said", env=env)))[0] == 0
    assert (box.path / "said").read_text() == expected


@pytest.mark.parametrize("no_new_privs", [False, True])
async def test_a_start_container_hook_is_under_the_filter(box: Box, no_new_privs: bool) -> None:
    value = _with_hook(box, "mkdir /tmp/made", env=["PATH=/bin"])
    value["process"]["noNewPrivileges"] = no_new_privs
    value["linux"]["seccomp"] = profile("SCMP_ACT_ALLOW", "SCMP_ACT_KILL_PROCESS", ["mkdir", "mkdirat"])
    with pytest.raises(LaunchError, match=r"startContainer hook #0: /bin/sh: .*(bad system call|status 159)"):
        await box.output(value)


def test_flags_of_a_personality(box: Box) -> None:
    value = config()
    value["linux"]["personality"] = {"domain": "LINUX", "flags": ["ADDR_NO_RANDOMIZE", "UNAME26"]}
    assert box.sh("cat /proc/self/personality", value) == "00060000\n"


def test_memory_policy(box: Box) -> None:
    """Of a stack touched while it was in effect: numa_maps(5)."""
    value = config()
    value["linux"]["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "0", "flags": ["MPOL_F_STATIC_NODES"]}
    assert "bind=static:0" in box.sh("grep heap /proc/self/numa_maps", value)

    async def work() -> tuple[int, str, str]:
        init = await box.running(value | {"process": value["process"] | {"args": ["sleep", "1000"]}})
        return await box.exec(init, {"args": ["grep", "heap", "/proc/self/numa_maps"]}, value)

    assert "bind=static:0" in box.run(work())[1]
    value["linux"]["memoryPolicy"] = {"mode": "MPOL_BIND", "nodes": "900"}
    with pytest.raises(LaunchError, match="memory policy: set_mempolicy \\(invalid argument\\)"):
        box.run(box.output(value))


@pytest.mark.parametrize(
    ("policy", "field"),
    [
        ({"mode": "BIND", "nodes": "0"}, "mode"),
        ({"mode": "MPOL_BIND", "nodes": "zero"}, "nodes"),
        ({"mode": "MPOL_BIND", "nodes": "0", "flags": ["STATIC"]}, "flags"),
        ({"mode": "MPOL_DEFAULT", "nodes": "0-7"}, "nodes"),
        ({"mode": "MPOL_BIND"}, "nodes"),
    ],
)
async def test_memory_policies_that_are_not_valid(box: Box, policy: dict[str, Any], field: str) -> None:
    value = config()
    value["linux"]["memoryPolicy"] = policy
    with pytest.raises(SpecError, match=rf"linux\.memoryPolicy\.{field}: "):
        await box.output(value)


def test_a_session_keyring_of_its_own_or_the_callers(box: Box) -> None:
    (box.path / "keyring.c").write_text(KEYRING)
    subprocess.run(["musl-gcc", "-static", "-o", box.rootfs / "bin/keyring", box.path / "keyring.c"], check=True)

    def keyring(**launch: Any) -> str:
        status, out, _ = box.run(box.output(config("/bin/keyring"), **launch))
        assert status == 0
        return out

    assert len({keyring(), keyring(), keyring(keyring=False)}) == 3
    assert keyring(keyring=False) == keyring(keyring=False)


def test_a_user_namespace_without_root(box: Box) -> None:
    for path in (box.rootfs, *box.rootfs.rglob("*")):
        os.chown(path, 100_000, 100_000, follow_symlinks=False)
    value = config("sh", "-c", "id -u; id -g; cat /proc/self/uid_map", user={"uid": 1000, "gid": 1000})
    maps = [{"containerID": 1000, "hostID": 100_000, "size": 1}]
    value["linux"] |= {"uidMappings": maps, "gidMappings": maps}
    value["linux"]["namespaces"].append({"type": "user"})
    value["mounts"][2]["options"].remove("gid=5")
    status, out, err = box.run(box.output(value))
    assert (status, err, out.split()) == (0, "", ["1000", "1000", "1000", "100000", "1"])

    async def work() -> tuple[int, str, str]:
        init = await box.running(value | {"process": value["process"] | {"args": ["sleep", "1000"]}})
        return await box.exec(init, {"args": ["id", "-u"], "user": {"uid": 1000, "gid": 1000}}, value)

    assert box.run(work()) == (0, "1000\n", "")


@pytest.mark.parametrize(
    ("flags", "number"), [(None, 4), ([], 0), (["SECCOMP_FILTER_FLAG_TSYNC", "SECCOMP_FILTER_FLAG_LOG"], 2)]
)
def test_flags_of_a_filter_are_logged(box: Box, flags: list[str] | None, number: int) -> None:
    value = config()
    value["linux"]["seccomp"] = {"defaultAction": "SCMP_ACT_ALLOW"} | ({} if flags is None else {"flags": flags})
    box.sh("true", value)
    assert f"box debug seccomp filter flags: {number}" in box.lines
