"""Test create, start and exec through the launcher: failures leave nothing, and their messages are runc's."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import struct
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer import intel_rdt
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process.launch import Launched, Stdio
from caisson.agent.libcontainer.process.nsexec import Nsexec
from tests.native.command_box import CommandBox
from tests.native.nsexec_support import Box, children, config

pytestmark = pytest.mark.root


async def _fails(box: Box, value: dict[str, Any], **keywords: Any) -> LaunchError:
    with pytest.raises(LaunchError) as caught:
        await box.create(value, **keywords)
    assert not box.fifo.exists()
    assert children() == []
    return caught.value


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("nothere", 'exec: "nothere": executable file not found in $PATH'),
        ("", 'exec: "": executable file not found in $PATH'),
        ("/nothere", 'exec: "/nothere": stat /nothere: no such file or directory'),
        ("/etc/passwd", 'exec: "/etc/passwd": permission denied'),
        ("/bin", 'exec: "/bin": is a directory'),
        ("/etc/passwd/x", 'exec: "/etc/passwd/x": stat /etc/passwd/x: not a directory'),
    ],
)
async def test_programs_that_cannot_be_found_at_create(box: Box, program: str, message: str) -> None:
    error = await _fails(box, config(program))
    assert (str(error), error.step, error.path) == (message, "lookup", program)


async def test_a_resctrl_that_was_unmounted_fails_the_create(box: Box, monkeypatch: pytest.MonkeyPatch) -> None:
    mounted = iter([str(box.path), None])
    monkeypatch.setattr(intel_rdt, "mounted", lambda: next(mounted))
    value = config()
    value["linux"]["intelRdt"] = {"enableMonitoring": True}
    assert "no resctrl file system is mounted" in str(await _fails(box, value))


async def test_without_a_path_nothing_is_found(box: Box) -> None:
    assert str(await _fails(box, config("sh", env=["A=b"]))) == 'exec: "sh": executable file not found in $PATH'


async def test_relative_path_entries_are_skipped(box: Box) -> None:
    (box.rootfs / "tmp" / "sh").symlink_to("/bin/busybox")
    assert "not found" in str(await _fails(box, config("sh", env=["PATH=.::tmp"], cwd="/tmp")))


async def test_the_id_is_free_again_after_a_failure(box: Box) -> None:
    await _fails(box, config("nothere"))
    assert await box.shell("echo again") == "again\n"


async def test_a_program_that_the_kernel_refuses_fails_at_start(box: Box) -> None:
    program = box.rootfs / "bin" / "junk"
    program.write_bytes(b"\x7fELF junk")
    program.chmod(0o755)

    launched = await box.create(config("junk"))
    with pytest.raises(LaunchError, match=r"exec /bin/junk: exec format error"):
        await box.start(launched)
    assert (await launched.child.wait()) == 1


async def test_cwd_that_is_no_directory(box: Box) -> None:
    assert str(await _fails(box, config(cwd="/etc/passwd"))) == 'working directory "/etc/passwd": not a directory'


async def test_mount_failures_name_the_mount(box: Box) -> None:
    value = config()
    value["mounts"].append({"destination": "/mnt", "type": "bind", "source": "/no/such", "options": ["bind"]})
    assert str(await _fails(box, value)) == "mount source /no/such: no such file or directory"
    value["mounts"][-1] = {"destination": "/mnt", "type": "nofs", "source": "x"}
    assert "error mounting /mnt: the kernel has no such file system" in str(await _fails(box, value))
    value["mounts"][-1] = {"destination": "/mnt", "type": "tmpfs", "source": "x", "options": ["size=wrong"]}
    assert "size" in str(await _fails(box, value))


async def test_messages_that_are_too_long_are_rejected(box: Box) -> None:
    assert "args and env takes" in str(await _fails(box, config("true", "x" * (3 << 20))))
    assert "process.cwd takes 70001 bytes" in str(await _fails(box, config(cwd="/" + "x" * 69_999)))


async def test_large_args_arrive(box: Box) -> None:
    args = ["sh", "-c", "echo $# ${#1}", "sh", *(["x" * 100_000] * 12)]
    assert (await box.output(config(*args))) == (0, "12 100000\n", "")


async def test_exec_enters_all_namespaces(box: Box) -> None:
    init = await box.running()
    script = "for n in ipc mnt net pid uts; do readlink /proc/self/ns/$n; done; hostname"
    result = await box.exec(init, {"args": ["sh", "-c", script]})
    own = Path(f"/proc/{init.child.pid}/ns")
    names = [str((own / name).readlink()) for name in ("ipc", "mnt", "net", "pid", "uts")]
    (status, out, err), names = result, names
    assert (status, err) == (0, "")
    assert out.split() == [*names, "box"]


async def test_exec_enters_what_the_init_joined_beyond_its_configuration(box: Box) -> None:
    value = config("sleep", "1000")
    value["hostname"] = ""
    value["linux"]["namespaces"] = [{"type": name} for name in ("pid", "mount")]

    first = await box.running()
    join = {"uts": f"/proc/{first.child.pid}/ns/uts", "ipc": f"/proc/{first.child.pid}/ns/ipc"}
    second = await box.running(value, join=join)
    assert (await box.exec(second, {"args": ["hostname"]}, value)) == (0, "box\n", "")


async def test_exec_statuses_and_streams(box: Box) -> None:
    init = await box.running()
    scripts = ["echo out; echo err >&2; exit 7", "kill -9 $$", "kill -TERM $$"]
    assert ([await box.exec(init, {"args": ["sh", "-c", script]}) for script in scripts]) == [
        (7, "out\n", "err\n"),
        (137, "", ""),
        (143, "", ""),
    ]


async def test_exec_failures_read_as_runcs_and_leave_nothing(box: Box) -> None:
    init = await box.running()
    messages = []
    for process in ({"args": ["nothere"]}, {"args": ["/etc/passwd"]}, {"args": ["true"], "cwd": "/no/such"}):
        with pytest.raises(LaunchError) as caught:
            await box.exec(init, process)
        messages.append(str(caught.value))
    assert children() == [init.child.pid]
    assert messages == [
        'exec: "nothere": executable file not found in $PATH',
        'exec: "/etc/passwd": permission denied',
        'working directory "/no/such": no such file or directory',
    ]


async def test_exec_has_the_containers_rights_unless_it_names_its_own(box: Box) -> None:
    value = config("sleep", "1000", noNewPrivileges=True, rlimits=[{"type": "RLIMIT_NOFILE", "soft": 50, "hard": 60}])

    init = await box.running(value)
    script = "grep -E 'Cap(Eff|Inh|Bnd)|NoNew' /proc/self/status | cut -f2; ulimit -n; ls /proc/self/fd | wc -l"
    own = {name: ["CAP_KILL"] for name in ("bounding", "effective", "permitted")}
    results = [
        await box.exec(init, {"args": ["sh", "-c", script]}, value),
        await box.exec(init, {"args": ["sh", "-c", script], "capabilities": own}, value),
    ]
    first, second = [out.split() for _, out, _ in results]
    mask = f"{1 << 0 | 1 << 1 | 1 << 3 | 1 << 5 | 1 << 6 | 1 << 7 | 1 << 10:016x}"
    privileges = "0" if isinstance(box, CommandBox) else "1"  # on a host, as process.noNewPrivileges says, as in runc
    assert first == ["0" * 16, mask, mask, privileges, "50", "4"]
    assert second == ["0" * 16, f"{1 << 5:016x}", f"{1 << 5:016x}", privileges, "50", "4"]


def test_exec_as_a_user_owns_its_pipes_but_not_the_null_device(box: Box) -> None:
    before = Path("/dev/null").stat()

    async def run() -> bytes:
        init = await box.running()
        source, sink = os.pipe()
        null = os.open("/dev/null", os.O_RDWR)
        process = {"args": ["sh", "-c", "echo reopened >/dev/stdout"], "cwd": "/", "env": ["PATH=/bin"],
                   "user": {"uid": 1000, "gid": 1000}}  # fmt: skip
        try:
            launched = await box.launch_exec(
                Process.from_json(process), init, Spec.from_json(config()), Stdio(null, sink, null)
            )
            assert await launched.child.wait() == 0
            return os.read(source, 100)
        finally:
            for fd in (source, sink, null):
                os.close(fd)

    assert box.run(run()) == b"reopened\n"
    after = Path("/dev/null").stat()
    assert (after.st_uid, after.st_mode) == (before.st_uid, before.st_mode)


async def test_exec_into_a_dead_container(box: Box) -> None:
    with pytest.raises(LaunchError):
        init = await box.running()
        os.kill(init.child.pid, signal.SIGKILL)
        await init.child.wait()
        await box.exec(init, {"args": ["true"]})


async def test_exec_into_a_user_namespace(box: Box) -> None:
    value = config("sleep", "1000")
    value["linux"]["namespaces"].append({"type": "user"})
    value["linux"]["maskedPaths"] = []
    for kind in ("uidMappings", "gidMappings"):
        value["linux"][kind] = [{"containerID": 0, "hostID": 100000, "size": 65536}]

    init = await box.running(value)
    status, out, err = await box.exec(init, {"args": ["sh", "-c", "id -u; cat /proc/self/uid_map"]}, value)
    assert (status, out.split(), err) == (0, ["0", "0", "100000", "65536"], "")


def test_exec_is_born_in_the_cgroup(box: Box) -> None:
    from caisson.agent.libcontainer.cgroups import HierarchyV2

    hierarchy = HierarchyV2.find()
    assert hierarchy is not None
    cgroup = hierarchy.create(f"caisson-exec-{os.getpid()}")

    async def run() -> tuple[int, str, str]:
        init = await box.running(cgroup=cgroup)
        assert cgroup.pids() == [init.child.pid]
        return await box.exec(init, {"args": ["grep", "^0:", "/proc/self/cgroup"]}, cgroup=cgroup)

    try:
        assert box.run(run()) == (0, f"0::/caisson-exec-{os.getpid()}\n", "")
        box.run(cgroup.kill())
        box.run(box.created[0].child.wait())
    finally:
        box.run(cgroup.delete())


async def test_terminal_of_an_init(box: Box) -> None:
    value = config("sh", "-c", "tty; stty size; ls -l /dev/console | cut -c1; echo to-console >/dev/console",
                   terminal=True, consoleSize={"height": 33, "width": 99})  # fmt: skip

    launched = await box.create(value)
    await box.start(launched)
    assert (await _read_console(launched), await launched.child.wait()) == (
        "/dev/pts/0\r\n33 99\r\nc\r\nto-console\r\n",
        0,
    )


async def test_terminal_of_an_exec_is_controlling(box: Box) -> None:
    init = await box.running()
    process = Process.from_json(
        {"args": ["sh", "-c", "tty; echo reachable >/dev/tty; sleep 1000"], "cwd": "/", "env": ["PATH=/bin"],
         "terminal": True}
    )  # fmt: skip
    launched = await box.launch_exec(process, init, Spec.from_json(config()), None)
    assert launched.console is not None
    os.set_blocking(launched.console, True)
    seen = b""
    while not seen.endswith(b"reachable\r\n"):
        seen += os.read(launched.console, 100)
    os.write(launched.console, b"\x03")  # Ctrl-C
    status = await launched.child.wait()
    os.close(launched.console)
    assert (seen.decode(), status) == ("/dev/pts/0\r\nreachable\r\n", 130)


async def _read_console(launched: Launched) -> str:
    """Read all output, until the last process closes the terminal."""
    assert launched.console is not None
    seen = b""
    loop = asyncio.get_running_loop()
    while True:
        try:
            data = await loop.run_in_executor(None, os.read, launched.console, 1000)
        except OSError:  # EIO: nobody has it open any more
            return seen.decode()
        seen += data


async def test_the_fifo_can_be_opened_by_another_user(box: Box) -> None:
    launched = await box.create(config("true", user={"uid": 1000, "gid": 1000}))
    mode = stat.S_IMODE(box.fifo.stat().st_mode)
    await box.start(launched)
    assert not box.fifo.exists()
    assert (mode, await launched.child.wait()) == (0o622, 0)


def _fake(tmp_path: Path, text: str) -> Nsexec:
    """Replace nsexec with something else."""
    source = tmp_path / "fake.c"
    source.write_text(text)
    subprocess.run(["musl-gcc", "-static", "-o", tmp_path / "fake", source], check=True)
    return Nsexec.seal(tmp_path / "fake")


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("return 0;", "nsexec ended with status 0"),
        ("return 3;", "nsexec ended with status 3"),
        ("raise(9);", "nsexec was killed by signal 9"),
        ('write(atoi(getenv("_LIBCONTAINER_SYNCPIPE")), "garbage", 7); return 1;', "nsexec ended with status 1"),
        ('write(atoi(getenv("_LIBCONTAINER_INITPIPE")), "{\\"stage1_pid\\":1e9}\\n", 19);', "ended with status 0"),
        ("pause();", "took longer than 0.5 s"),
    ],
)
async def test_an_nsexec_that_dies_or_hangs(tmp_path: Path, body: str, message: str) -> None:
    program = f"#include <signal.h>\n#include <stdlib.h>\n#include <unistd.h>\nint main(void) {{ {body} return 0; }}\n"
    nsexec = _fake(tmp_path, program)
    box = Box(tmp_path, tmp_path, nsexec, timeout=0.5)
    start = time.monotonic()
    try:
        assert message in str(await _fails(box, config()))
        assert time.monotonic() - start < 2
    finally:
        nsexec.close()
        await box.close()


async def test_cancelling_a_create_leaves_nothing(box: Box) -> None:
    for turns in range(60):  # turns of the event loop: from before the spawn to the end of the create
        task = asyncio.ensure_future(box.create(config("sleep", "1000")))
        for _ in range(turns):
            await asyncio.sleep(0)
        if task.done():
            break
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not box.fifo.exists()
        async with asyncio.timeout(1):  # a stage 2 that nobody knew of notices its parent's exit, and exits
            while children():  # noqa: ASYNC110 - it is the reaper's, which tells nobody
                await asyncio.sleep(0.001)


async def test_many_at_once(box: Box) -> None:
    async def one(init: Launched, number: int) -> int:
        null = os.open("/dev/null", os.O_RDWR)
        args = [["true"], ["false"], ["nothere"], ["sh", "-c", "kill -9 $$"]][number % 4]
        try:
            launched = await box.launch_exec(
                Process.from_json({"args": args, "cwd": "/", "env": ["PATH=/bin"]}),
                init,
                Spec.from_json(config()),
                Stdio(null, null, null),
            )
        except LaunchError:
            return -1
        finally:
            os.close(null)
        return await launched.child.wait()

    init = await box.running()
    found: list[int] = []
    for _ in range(5):
        found += await asyncio.gather(*(one(init, number) for number in range(40)))
    assert children() == [init.child.pid]
    assert found == [0, 1, -1, 137] * 50


def test_the_program_is_sealed(nsexec_path: Path) -> None:
    nsexec = Nsexec.seal(nsexec_path)
    fd = nsexec._fd
    with pytest.raises(PermissionError):
        os.write(fd, b"x")
    with pytest.raises(PermissionError):
        os.truncate(fd, 0)
    with pytest.raises(OSError):
        os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)
    assert struct.unpack("4s", os.pread(fd, 4, 0))[0] == b"\x7fELF"
    nsexec.close()
