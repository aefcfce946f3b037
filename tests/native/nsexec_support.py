"""Support tests of nsexec: a busybox root, a reaper other than the agent's, and a box to run containers in."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import os
import shutil
import signal
import subprocess
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any, TypeVar

from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.spec import Spec
from caisson.agent.libcontainer.process.launch import Launch, Launched, Stdio
from caisson.agent.libcontainer.process.launcher import ProcessLauncher
from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.libcontainer.process.starter import Starter
from caisson.agent.model.waits import AsyncioWaits

T = TypeVar("T")
HERE = Path(__file__).resolve().parent
CAPABILITIES = [
    "CAP_CHOWN", "CAP_DAC_OVERRIDE", "CAP_FOWNER", "CAP_KILL", "CAP_SETGID", "CAP_SETUID", "CAP_NET_BIND_SERVICE",
]  # fmt: skip
CONFIG: dict[str, Any] = {
    "ociVersion": "1.2.0",
    "root": {"path": "rootfs"},
    "process": {
        "args": ["true"],
        "cwd": "/",
        "env": ["PATH=/bin", "TERM=xterm"],
        "user": {"uid": 0, "gid": 0},
        "capabilities": {name: CAPABILITIES for name in ("bounding", "effective", "permitted")},
    },
    "hostname": "box",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": ["nosuid", "noexec", "nodev"]},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": ["nosuid", "noexec", "nodev", "ro"]},
    ],
    "linux": {
        "namespaces": [{"type": name} for name in ("pid", "ipc", "uts", "mount", "network")],
        "maskedPaths": ["/proc/keys", "/proc/timer_list", "/proc/timer_list", "/sys/firmware", "/proc/no-such-file"],
        "readonlyPaths": ["/proc/sys", "/proc/sysrq-trigger", "/proc/irq", "/no-such-path"],
    },
}


def config(*args: str, **process: Any) -> dict[str, Any]:
    """Return a config.json to modify at will; `process` replaces fields of its process."""
    value = copy.deepcopy(CONFIG)
    value["process"].update({"args": list(args) or ["true"], **process})
    return value


class TestChild:
    """A child of the test process."""

    __test__ = False

    def __init__(self, pid: int) -> None:
        self.pid = pid
        self.status: asyncio.Future[int] = asyncio.get_running_loop().create_future()

    async def wait(self) -> int:
        return await asyncio.shield(self.status)


class Reaper:
    """The launcher's Children, as simple as possible."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._known: dict[int, TestChild] = {}
        self._unknown: dict[int, int] = {}
        self._expecting = 0
        loop.add_signal_handler(signal.SIGCHLD, self._reap)

    def _reap(self) -> None:
        while True:
            try:
                found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG)
            except ChildProcessError:
                return
            if found is None:
                return
            status = found.si_status if found.si_code == os.CLD_EXITED else 128 + found.si_status
            child = self._known.pop(found.si_pid, None)
            if child is not None:
                child.status.set_result(status)
            elif self._expecting:
                self._unknown[found.si_pid] = status

    @contextlib.contextmanager
    def expecting(self) -> Iterator[None]:
        self._expecting += 1
        try:
            yield
        finally:
            self._expecting -= 1
            if not self._expecting:
                self._unknown.clear()

    def claim(self, pid: int) -> TestChild:
        child = TestChild(pid)
        if pid in self._unknown:
            child.status.set_result(self._unknown.pop(pid))
        else:
            self._known[pid] = child
        return child


class Box:
    """A bundle and a launcher on the running event loop; checks for leaks.

    Tests that are not coroutines use the loop between its other tasks: ``run``, ``sh``.
    """

    def __init__(self, path: Path, rootfs: Path, nsexec: Nsexec, *, timeout: float = 20.0) -> None:
        self.path = path
        self.rootfs = rootfs
        self.loop = asyncio.get_running_loop()
        self.reaper = Reaper(self.loop)
        self.lines: list[str] = []
        self.launcher = ProcessLauncher(
            Starter(
                nsexec,
                self.reaper,
                AsyncioWaits(),
                lambda level, text, container: self.lines.append(f"{container} {level} {text}"),
                timeout=timeout,
            )
        )
        self.fifo = path / "exec.fifo"
        self.specs: dict[int, tuple[Spec, dict[str, str], bytes]] = {}  # by an init's pid
        self.created: list[Launched] = []
        self._fds, self._children = descriptors(), set(children())

    def run(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return self.loop.run_until_complete(coroutine)

    @contextlib.contextmanager
    def stdio(self, stdin: bytes = b"") -> Iterator[tuple[Stdio, Path, Path]]:
        """Return files for the three streams; a pipe would need a reader while the process runs."""
        source, out, err = (self.path / name for name in ("stdin", "stdout", "stderr"))
        source.write_bytes(stdin)
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        fds = [os.open(source, os.O_RDONLY), os.open(out, flags, 0o666), os.open(err, flags, 0o666)]
        try:
            yield Stdio(*fds), out, err
        finally:
            for fd in fds:
                os.close(fd)

    async def create(self, value: dict[str, Any], **keywords: Any) -> Launched:
        """Create with this box's paths; stdio is /dev/null unless given."""
        spec = Spec.from_json(value)
        null = os.open("/dev/null", os.O_RDWR)
        terminal = value["process"].get("terminal", False)
        cgroup, join = keywords.pop("cgroup", None), keywords.pop("join", {})
        stdio = keywords.pop("stdio", None if terminal else Stdio(null, null, null))
        more = {name: keywords.pop(name) for name in ("pivot", "keyring") if name in keywords}
        try:
            arguments: dict[str, Any] = {
                "bundle": str(self.path),
                "rootfs": str(self.rootfs),
                "join": join,
                "start_gate": str(self.fifo),
                "cgroups": {} if cgroup is None else cgroup.paths,
                "filter": await self.launcher.filter(spec.linux.seccomp),
                **keywords,
            }
            with contextlib.nullcontext({}) if cgroup is None else cgroup.join_fds() as fds:
                launched = await self.launcher.create(spec, Launch("box", stdio, fds, **more), **arguments)
        finally:
            os.close(null)
        self.created.append(launched)
        self.specs[launched.child.pid] = (spec, join, arguments["filter"])
        return launched

    async def start(self, launched: Launched) -> None:
        """Start a created container."""
        spec, _, _ = self.specs[launched.child.pid]
        await self.launcher.start(str(self.fifo), launched.child.pid, launched.pidfd, spec.hooks)

    async def launch_exec(
        self, process: Process, init: Launched, spec: Spec, stdio: Stdio | None, cgroup: Any = None
    ) -> Launched:
        """Exec in a running container."""
        _, join, filter = self.specs[init.child.pid]
        with contextlib.nullcontext({}) if cgroup is None else cgroup.join_fds() as fds:
            launched = await self.launcher.exec(
                process, Launch("box", stdio, fds), spec=spec, init_pid=init.child.pid, pidfd=init.pidfd, join=join,
                filter=filter,
            )  # fmt: skip
        os.close(launched.pidfd)
        return launched

    async def output(self, value: dict[str, Any], *, stdin: bytes = b"", **keywords: Any) -> tuple[int, str, str]:
        """Create, start and wait; return status, stdout, stderr."""
        with self.stdio(stdin) as (stdio, out, err):
            launched = await self.create(value, stdio=stdio, **keywords)
            await self.start(launched)
            status = await launched.child.wait()
        return status, out.read_text(errors="replace"), err.read_text(errors="replace")

    async def shell(self, script: str, value: dict[str, Any] | None = None, **keywords: Any) -> str:
        """Return the output of a shell script in a new container; it must succeed."""
        value = value or config()
        value["process"]["args"] = ["sh", "-c", script]
        status, out, err = await self.output(value, **keywords)
        assert (status, err) == (0, ""), (status, out, err)
        return out

    def sh(self, script: str, value: dict[str, Any] | None = None, **keywords: Any) -> str:
        """Do the same, for tests that are not coroutines."""
        return self.run(self.shell(script, value, **keywords))

    async def running(self, value: dict[str, Any] | None = None, **keywords: Any) -> Launched:
        """Start a container that keeps running."""
        value = value or config("sleep", "1000")
        launched = await self.create(value, **keywords)
        await self.start(launched)
        return launched

    async def exec(
        self, init: Launched, process: dict[str, Any], value: dict[str, Any] | None = None, **keywords: Any
    ) -> tuple[int, str, str]:
        """Exec and wait; return status, stdout, stderr."""
        spec = Spec.from_json(value or config())
        process = {"env": ["PATH=/bin"], "cwd": "/", **process}
        with self.stdio() as (stdio, out, err):
            launched = await self.launch_exec(Process.from_json(process), init, spec, stdio, **keywords)
            status = await launched.child.wait()
        return status, out.read_text(), err.read_text()

    async def close(self) -> None:
        """Kill what still runs and check that nothing is left: no child, no descriptor, no fifo after a failure."""
        for launched in self.created:
            with contextlib.suppress(ProcessLookupError):
                if not launched.child.status.done():  # type: ignore[attr-defined]
                    os.kill(launched.child.pid, signal.SIGKILL)
            await launched.child.wait()
            if launched.console is not None:
                os.close(launched.console)
            os.close(launched.pidfd)
        left = set(children()) - self._children
        self.loop.remove_signal_handler(signal.SIGCHLD)
        assert left == set()
        assert descriptors() <= self._fds


def descriptors() -> set[str]:
    """Return this process's open descriptors: numbers and targets."""
    found = set()
    for link in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):  # the directory just read
            found.add(f"{link.name} {link.readlink()}")
    return found


def children() -> list[int]:
    """Return this process's children, including zombies."""
    return [int(pid) for pid in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]


def make_rootfs(path: Path) -> Path:
    """Create a root with busybox and empty directories."""
    assert Path("/bin/busybox").exists(), "busybox is not installed; run: apt-get install busybox-static"
    for name in ("bin", "proc", "sys", "dev", "tmp", "run", "root", "home", "var", "etc", "mnt"):
        (path / name).mkdir(parents=True)
    shutil.copy("/bin/busybox", path / "bin" / "busybox")
    for applet in subprocess.check_output(["/bin/busybox", "--list"], text=True).split():
        if applet != "busybox":
            (path / "bin" / applet).symlink_to("busybox")
    (path / "etc" / "passwd").write_text("root:x:0:0:root:/root:/bin/sh\n")
    path.chmod(0o755)
    return path
