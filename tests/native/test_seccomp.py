"""Test seccomp filters in real containers."""

from __future__ import annotations

import platform
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import Box, config

pytestmark = pytest.mark.root

NATIVE = {"x86_64": "SCMP_ARCH_X86_64", "aarch64": "SCMP_ARCH_AARCH64"}[platform.machine()]

#: Makes the system call with the given number and arguments, and prints the result.
CALLER = r"""
#include <errno.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/syscall.h>
#include <unistd.h>
int main(int argc, char **argv)
{
	long value[7] = {0};
	for (int i = 1; i < argc && i < 8; i++)
		value[i - 1] = strtol(argv[i], NULL, 0);
	errno = 0;
	long result = syscall(value[0], value[1], value[2], value[3], value[4], value[5], value[6]);
	printf("%ld %d\n", result < 0 ? -1 : 0, errno);
	return 0;
}
"""
SYSTEM_CALLS = {"x86_64": {"personality": 135, "getpriority": 140}, "aarch64": {"personality": 92, "getpriority": 141}}
PERSONALITY, GETPRIORITY = (SYSTEM_CALLS[platform.machine()][name] for name in ("personality", "getpriority"))
#: System calls that busybox needs, and nsexec on the way; engines' profiles list them by the hundred.
NAMES = """
access arch_prctl brk capget capset chdir clock_gettime clock_nanosleep clone clone3 close close_range dup dup2
dup3 execve execveat exit exit_group faccessat faccessat2 fchdir fchown fcntl fork fstat fstatfs futex getcwd
getdents64 getegid geteuid getgid getpgrp getpid getppid getrandom getrlimit gettid getuid ioctl keyctl lseek
lstat madvise mmap mprotect munmap nanosleep newfstatat open openat openat2 pipe pipe2 poll ppoll prctl pread64
prlimit64 pwrite64 read readlink readlinkat readv recvfrom recvmsg restart_syscall rseq rt_sigaction
rt_sigprocmask rt_sigreturn rt_sigtimedwait sendmsg sendto set_robust_list set_tid_address setgid setgroups
setpgid setresgid setresuid setrlimit setsid setuid sigaltstack stat statfs statx sysinfo tgkill tkill umask
uname unlink unlinkat vfork wait4 waitid write writev a_call_that_no_library_knows
"""
NOT_YET = 10_000  # a number that no kernel implements


@pytest.fixture(scope="module")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("caller")
    (directory / "caller.c").write_text(CALLER)
    command = ["musl-gcc", "-static", "-O1", "-o"]
    subprocess.run([*command, directory / "caller", directory / "caller.c"], check=True)
    return directory / "caller"


def value(profile: dict[str, Any], *args: str, **process: Any) -> dict[str, Any]:
    made = config(*args, **process)
    made["linux"]["seccomp"] = profile
    return made


def denying(*names: str, **rule: Any) -> dict[str, Any]:
    """Return a profile that allows all except these."""
    denied = {"names": list(names), "action": "SCMP_ACT_ERRNO", **rule}
    return {"defaultAction": "SCMP_ACT_ALLOW", "architectures": [NATIVE], "syscalls": [denied]}


def called(box: Box, caller: Path, profile: dict[str, Any], *numbers: int, **process: Any) -> str:
    """Return the result of a system call in a container with this profile."""
    target = box.rootfs / "bin/caller"
    if not target.exists():
        target.write_bytes(caller.read_bytes())
        target.chmod(0o755)
    status, out, err = box.run(box.output(value(profile, "/bin/caller", *map(str, numbers), **process)))
    return out.strip() if status == 0 else f"status {status} {err}"


@pytest.mark.parametrize("privileges", [False, True])
def test_a_denied_call_gets_its_errno(box: Box, caller: Path, privileges: bool) -> None:
    process = {"noNewPrivileges": not privileges}
    assert called(box, caller, denying("personality"), PERSONALITY, 0xFFFFFFFF, **process) == "-1 1"
    assert called(box, caller, denying("personality", errnoRet=95), PERSONALITY, 0xFFFFFFFF, **process) == "-1 95"
    assert called(box, caller, denying("getpriority"), PERSONALITY, 0xFFFFFFFF, **process) == "0 0"


@pytest.mark.parametrize("privileges", [False, True])
async def test_it_is_in_force_for_all_processes(box: Box, privileges: bool) -> None:
    script = "grep -E '^(Seccomp|NoNewPrivs):' /proc/self/status"
    own = value(denying("personality"), "sleep", "1000", noNewPrivileges=not privileges)
    expected = f"NoNewPrivs:\t{int(not privileges)}\nSeccomp:\t2\n"

    init = await box.running(own)
    status = Path(f"/proc/{init.child.pid}/status").read_text()
    assert "\nSeccomp:\t2\n" in status
    process = {"args": ["sh", "-c", script], "noNewPrivileges": not privileges}
    assert (await box.exec(init, process, own)) == (0, expected, "")


@pytest.mark.parametrize(
    "args, denied, allowed",
    [
        ([{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}], [8], [0xFFFFFFFF]),
        ([{"index": 0, "value": 8, "op": "SCMP_CMP_NE"}], [0xFFFFFFFF], [8]),
        ([{"index": 0, "value": 8, "op": "SCMP_CMP_GE"}], [8, 0xFFFFFFFF], [0]),
        ([{"index": 0, "value": 8, "op": "SCMP_CMP_LT"}], [0], [8]),
        ([{"index": 0, "value": 0xF, "valueTwo": 8, "op": "SCMP_CMP_MASKED_EQ"}], [8], [0, 0xFFFFFFFF]),
        # several conditions on one argument: any of them
        (
            [{"index": 0, "value": 8, "op": "SCMP_CMP_EQ"}, {"index": 0, "value": 0, "op": "SCMP_CMP_EQ"}],
            [0, 8],
            [0xFFFFFFFF],
        ),
    ],
)
def test_arguments_decide(box: Box, caller: Path, args: list[Any], denied: list[int], allowed: list[int]) -> None:
    profile = denying("personality", args=args)
    for argument in denied:
        assert called(box, caller, profile, PERSONALITY, argument) == "-1 1", argument
    for argument in allowed:
        assert called(box, caller, profile, PERSONALITY, argument) == "0 0", argument


def test_several_arguments_all_have_to_match(box: Box, caller: Path) -> None:
    args = [{"index": index, "value": index + 1, "op": "SCMP_CMP_EQ"} for index in (0, 1)]
    profile = denying("getpriority", args=args, errnoRet=95)
    assert called(box, caller, profile, GETPRIORITY, 1, 2) == "-1 95"
    assert called(box, caller, profile, GETPRIORITY, 1, 3) != "-1 95"


@pytest.mark.parametrize(
    "action, status", [("SCMP_ACT_KILL", 159), ("SCMP_ACT_KILL_PROCESS", 159), ("SCMP_ACT_TRAP", 159)]
)
def test_one_that_kills(box: Box, caller: Path, action: str, status: int) -> None:
    profile = denying("personality", action=action)
    assert called(box, caller, profile, PERSONALITY, 0xFFFFFFFF).startswith(f"status {status}")


@pytest.mark.parametrize("default, denied", [("SCMP_ACT_ERRNO", "-1 1"), ("SCMP_ACT_KILL_PROCESS", "status 159 ")])
@pytest.mark.parametrize("privileges", [False, True])
def test_system_calls_newer_than_the_profile_return_enosys(
    box: Box, caller: Path, default: str, denied: str, privileges: bool
) -> None:
    allowed = {"names": NAMES.split(), "action": "SCMP_ACT_ALLOW"}
    profile = {"defaultAction": default, "architectures": [NATIVE], "syscalls": [allowed]}
    process = {"noNewPrivileges": not privileges}
    assert called(box, caller, profile, NOT_YET, **process) == "-1 38"
    assert called(box, caller, profile, PERSONALITY, 0xFFFFFFFF, **process) == denied


def test_an_errno_of_the_default(box: Box, caller: Path) -> None:
    allowed = {"names": NAMES.split(), "action": "SCMP_ACT_ALLOW"}
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": 95, "syscalls": [allowed]}
    assert called(box, caller, profile, PERSONALITY, 0xFFFFFFFF) == "-1 95"
    assert called(box, caller, profile, NOT_YET) == "-1 38"


@pytest.mark.skipif(platform.machine() != "x86_64", reason="needs x86_64")
def test_architectures_beside_the_native_one(box: Box, caller: Path) -> None:
    """Each has its own numbers, and its own highest one."""
    allowed = {"names": NAMES.split(), "action": "SCMP_ACT_ALLOW"}
    others = ["SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"]
    profile = {"defaultAction": "SCMP_ACT_ERRNO", "architectures": others, "syscalls": [allowed]}
    assert called(box, caller, profile, NOT_YET) == "-1 38"
    assert called(box, caller, profile, PERSONALITY, 0xFFFFFFFF) == "-1 1"
    assert called(box, caller, profile, 0x40000000 + NOT_YET) == "-1 38"
    assert called(box, caller, profile, 0x40000000 + PERSONALITY, 0xFFFFFFFF) == "-1 1"
    # Without x32 its numbers are those of a foreign architecture.
    profile["architectures"] = others[:2]
    assert called(box, caller, profile, 0x40000000 + PERSONALITY).startswith("status 159")


def test_flags(box: Box, caller: Path) -> None:
    profile = denying("personality") | {
        "flags": [f"SECCOMP_FILTER_FLAG_{name}" for name in ("TSYNC", "LOG", "SPEC_ALLOW")]
    }
    assert called(box, caller, profile, PERSONALITY, 0xFFFFFFFF) == "-1 1"


async def test_a_profile_that_denies_the_program_is_told(box: Box) -> None:
    with pytest.raises(LaunchError, match="exec /bin/true: operation not permitted"):
        await box.output(value(denying("execve"), "true", noNewPrivileges=True))
