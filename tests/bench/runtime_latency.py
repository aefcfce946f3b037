"""Measure the latency of a container, and of an exec: ours against crun, runc and the kernel's minimum.

All of them run the same program (busybox's true) in the same root with the same config.json, in turn and in one run,
from the request until the runtime knows that the program has exited.  Ours is the agent's path without an RPC: the
launcher of agent/libcontainer and nsexec.  The others are spawned as a host would spawn them.  No cgroups are used:
crun 1.8 rejects the hybrid layout of many machines, so all run in a mount namespace without cgroup v2, and the others
with cgroups disabled if possible.

`caisson-oci` is the command line, spawned like the others, with cgroups like runc; its front handles `exec` and
`state`. `exec` is a process in a running container; `create+start` a container from creation to exit; `private memory`
is that of the process which sets up the container, while it waits to be started.

    python -m tests.bench.runtime_latency [--samples N] [--json]
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from caisson.agent.base.signals import Signals
from caisson.agent.libcontainer.config.process import Process
from caisson.agent.libcontainer.config.spec import Hooks, Spec
from caisson.agent.libcontainer.process.fork_server import ForkServer
from caisson.agent.libcontainer.process.launch import Launch, Stdio
from caisson.agent.libcontainer.process.launcher import ProcessLauncher
from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.libcontainer.process.starter import Starter
from caisson.agent.model.reaper import Child, Reaper
from caisson.agent.model.waits import AsyncioWaits
from tests.bench.rows import Row, table

ROOT = Path(__file__).resolve().parents[2]
SAMPLES = 60
EXEC_BUDGET, RUN_BUDGET, MEMORY_BUDGET = 0.4, 0.5, 1.0
#: For the command line, against runc.  `run` is dominated by the start of an interpreter and its imports.
COMMAND_BUDGETS = {"run": 2.5, "exec": 1.0, "state": 1.0}
COMMAND = ROOT / "commands" / "caisson-oci"
TRUE = ["/bin/true"]
CAPABILITIES = ["CAP_AUDIT_WRITE", "CAP_KILL", "CAP_NET_BIND_SERVICE"]
FLAGS = ["nosuid", "noexec", "nodev"]
CONFIG: dict[str, Any] = {
    "ociVersion": "1.0.2",
    "process": {
        "user": {"uid": 0, "gid": 0},
        "args": TRUE,
        "env": ["PATH=/bin"],
        "cwd": "/",
        "capabilities": {kind: CAPABILITIES for kind in ("bounding", "effective", "permitted")},
        "noNewPrivileges": True,
    },
    "root": {"path": "rootfs", "readonly": True},
    "hostname": "bench",
    "mounts": [
        {"destination": "/proc", "type": "proc", "source": "proc", "options": FLAGS},
        {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755", "size=64k"]},
        {
            "destination": "/dev/pts",
            "type": "devpts",
            "source": "devpts",
            "options": ["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
        },
        {"destination": "/dev/shm", "type": "tmpfs", "source": "shm", "options": [*FLAGS, "mode=1777", "size=64k"]},
        {"destination": "/dev/mqueue", "type": "mqueue", "source": "mqueue", "options": FLAGS},
        {"destination": "/sys", "type": "sysfs", "source": "sysfs", "options": [*FLAGS, "ro"]},
    ],
    "linux": {
        "namespaces": [{"type": kind} for kind in ("pid", "network", "ipc", "uts", "mount")],
        "maskedPaths": ["/proc/acpi", "/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/scsi", "/sys/firmware"],
        "readonlyPaths": ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"],
    },
}


class Ours:
    """The agent's path, in this process's event loop."""

    def __init__(self, work: Path, bundle: Path) -> None:
        make = ["make", "-s", "-C", str(ROOT / "agent/nsexec"), f"BUILD={work}", "nsexec", "front"]
        subprocess.run(make, check=True)
        self._loop = asyncio.new_event_loop()
        self._reaper = Reaper()
        self._signals = Signals(self._loop)
        self._reaper.start(self._signals)
        self._nsexec = Nsexec.seal(work / "nsexec")
        self._server = ForkServer(self._nsexec, self._reaper)
        self._launcher = ProcessLauncher(
            Starter(
                self._nsexec, self._reaper, AsyncioWaits(), lambda *_, **__: None, verbose=False, server=self._server
            )
        )
        self._null = os.open("/dev/null", os.O_RDWR)
        self._bundle = bundle
        self._gate = work / "exec.fifo"
        self._spec = Spec.from_json(CONFIG)  # of the container in which processes are run: an agent knows it
        self.target: Child | None = None
        self._pidfd = -1

    async def _create(self, config: dict[str, Any]) -> tuple[Child, int]:
        launched = await self._launcher.create(
            Spec.from_json(config),
            Launch("bench", Stdio(self._null, self._null, self._null)),
            bundle=str(self._bundle),
            rootfs=str(self._bundle / "rootfs"),
            join={},
            start_gate=str(self._gate),
        )
        assert isinstance(launched.child, Child)
        return launched.child, launched.pidfd

    async def _run(self, config: dict[str, Any]) -> tuple[Child, int]:
        child, pidfd = await self._create(config)
        await self._launcher.start(str(self._gate), child.pid, pidfd, Hooks())
        return child, pidfd

    async def _exec(self) -> None:
        assert self.target is not None
        launched = await self._launcher.exec(
            Process.from_json(CONFIG["process"]),
            Launch("bench", Stdio(self._null, self._null, self._null)),
            spec=self._spec,
            init_pid=self.target.pid,
            pidfd=self._pidfd,
            join={},
            rootfs=str(self._bundle / "rootfs"),
        )
        os.close(launched.pidfd)
        assert await launched.child.wait() == 0

    def begin(self) -> None:
        """Start a container in which to run processes."""
        config = CONFIG | {"process": CONFIG["process"] | {"args": ["/bin/sleep", "1000000"]}}
        self.target, self._pidfd = self._loop.run_until_complete(self._run(config))

    def exec(self) -> None:
        self._loop.run_until_complete(self._exec())

    def run(self) -> None:
        async def whole() -> None:
            child, pidfd = await self._run(CONFIG)
            os.close(pidfd)
            assert await child.wait() == 0

        self._loop.run_until_complete(whole())

    def memory(self) -> int:
        async def waiting() -> int:
            child, pidfd = await self._create(CONFIG)
            os.close(pidfd)
            found = private_memory(child.pid)
            child.signal(9)
            await child.wait()
            self._gate.unlink()
            return found

        return self._loop.run_until_complete(waiting())

    def close(self) -> None:
        if self.target is not None:
            self.target.signal(9)
            self._loop.run_until_complete(self.target.wait())
        if self._pidfd >= 0:
            os.close(self._pidfd)
        self._server.close()
        self._nsexec.close()
        self._signals.close()
        os.close(self._null)
        self._loop.close()


class Peer:
    """Another runtime, as a command."""

    def __init__(self, program: str, work: Path, bundle: Path, options: tuple[str, ...] = ()) -> None:
        self.program = program
        self._bundle = bundle
        self._words = [shutil.which(program) or program, "--root", str(work / f"{Path(program).name}-state"), *options]
        self._number = 0

    def _do(self, *words: str) -> None:
        # Not with subprocess, which would wait for its child itself: here the reaper does.
        pid = os.posix_spawn(
            self._words[0],
            [*self._words, *words],
            os.environ,
            file_actions=[(os.POSIX_SPAWN_OPEN, fd, "/dev/null", os.O_RDWR, 0) for fd in range(3)],
        )
        _, status = os.waitpid(pid, 0)
        if status:
            raise SystemExit(f"{self.program} {' '.join(words)}: status {status}")

    def _created(self, words: tuple[str, ...]) -> str:
        self._number += 1
        name = f"bench-{os.getpid()}-{Path(self.program).name}-{self._number}"  # also for a cgroup
        self._do(*words, "--bundle", str(self._bundle), name)
        return name

    def begin(self) -> None:
        config = CONFIG | {"process": CONFIG["process"] | {"args": ["/bin/sleep", "1000000"]}}
        (self._bundle / "config.json").write_text(json.dumps(config))
        self._target = self._created(("run", "--detach"))
        (self._bundle / "config.json").write_text(json.dumps(CONFIG))

    def exec(self) -> None:
        self._do("exec", self._target, *TRUE)

    def run(self) -> None:
        self._created(("run",))

    def state(self) -> None:
        self._do("state", self._target)

    def memory(self) -> int:
        file = self._bundle / "pid"
        name = self._created(("create", "--pid-file", str(file)))
        try:
            return private_memory(int(file.read_text()))
        finally:
            self._do("delete", "--force", name)

    def close(self) -> None:
        self._do("delete", "--force", self._target)


def private_memory(pid: int) -> int:
    """Return the KiB that no other process shares (smaps_rollup, proc(5))."""
    lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith("Private_"))


def timed(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return (time.perf_counter() - began) * 1000


def limit(program: Path, kind: str, where: str, samples: int) -> float:
    """Return the C program's median, in milliseconds."""
    command = [str(program), kind, where, str(samples), *TRUE]
    out = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout
    return statistics.median(map(int, out.split())) / 1000


def measure(samples: int) -> list[Row]:
    """Return the rows; must run in a private mount namespace without cgroup v2 (see `main`)."""
    for program in ("crun", "runc", "gcc", "busybox"):
        if shutil.which(program) is None:
            raise SystemExit(f"{program} is not installed; run: sudo apt-get install crun runc gcc busybox-static")
    with tempfile.TemporaryDirectory(prefix="caisson-bench-") as directory:
        work = Path(directory)
        bundle = work / "bundle"
        rootfs = bundle / "rootfs"
        for name in ("bin", "dev", "proc", "sys", "tmp"):
            (rootfs / name).mkdir(parents=True)
        shutil.copy(shutil.which("busybox") or "", rootfs / "bin/busybox")
        for name in ("true", "sleep", "sh"):
            (rootfs / "bin" / name).symlink_to("busybox")
        (bundle / "config.json").write_text(json.dumps(CONFIG))
        subprocess.run(["gcc", "-O2", "-static", "-o", work / "limit", ROOT / "tests/bench/limit.c"], check=True)
        ours = Ours(work, bundle)
        crun = Peer("crun", work, bundle, ("--cgroup-manager=disabled",))
        runc = Peer("runc", work, bundle)
        os.environ |= {"CAISSON_NSEXEC": str(work / "nsexec"), "CAISSON_FRONT": str(work / "caisson-oci")}
        command = Peer(str(COMMAND), work, bundle)
        everyone = {"ours": ours, "crun": crun, "runc": runc, "command": command}
        times: dict[tuple[str, str], list[float]] = {}
        try:
            for one in everyone.values():
                one.begin()  # type: ignore[attr-defined]
            assert ours.target is not None
            for number in range(samples + 3):
                for name, one in everyone.items():
                    for kind in ("exec", "run") if one is ours else ("exec", "run", "state"):
                        took = timed(getattr(one, kind))
                        if number >= 3:  # the first ones warm up caches
                            times.setdefault((name, kind), []).append(took)
                for kind, where in (("exec", str(ours.target.pid)), ("run", str(rootfs))):
                    times.setdefault(("limit", kind), []).append(limit(work / "limit", kind, where, 1))
            memory = {name: statistics.median(one.memory() for _ in range(5)) for name, one in everyone.items()}  # type: ignore[attr-defined]
        finally:
            for one in everyone.values():
                one.close()  # type: ignore[attr-defined]
    medians = {key: statistics.median(values) for key, values in times.items()}
    rows = []
    for kind, what, budget in (("exec", "exec", EXEC_BUDGET), ("run", "create+start", RUN_BUDGET)):
        own = medians["ours", kind]
        for peer, bound in (("crun", budget), ("runc", None)):
            theirs = medians[peer, kind]
            rows.append(Row.beside(f"{what}, beside {peer} (ms)", own, theirs, bound, medians["limit", kind]))
    for kind, what in (("run", "run"), ("exec", "exec"), ("state", "state")):
        own, theirs = medians["command", kind], medians["runc", kind]
        rows.append(Row.beside(f"caisson-oci {what}, beside runc (ms)", own, theirs, COMMAND_BUDGETS[kind]))
        rows.append(Row.beside(f"caisson-oci {what}, beside crun (ms)", own, medians["crun", kind], None))
    own_memory, theirs = memory["ours"], memory["crun"]
    rows.append(Row.beside("private memory, beside crun (KiB)", own_memory, theirs, MEMORY_BUDGET))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.bench.runtime_latency", description=__doc__.partition("\n")[0]
    )
    parser.add_argument("--samples", type=int, default=SAMPLES, help="of each kind (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    options = parser.parse_args()
    if "CAISSON_BENCH_INSIDE" not in os.environ:
        script = 'umount -l /sys/fs/cgroup/unified 2>/dev/null; CAISSON_BENCH_INSIDE=1 exec "$@"'
        inside = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "bench"]
        os.execvp("unshare", [*inside, sys.executable, "-m", "tests.bench.runtime_latency", *sys.argv[1:]])
    rows = measure(options.samples)
    print(json.dumps([row.plain() for row in rows], indent=1) if options.json else "\n".join(table(rows)))
    sys.exit(any(row.passed is False for row in rows))


if __name__ == "__main__":
    main()
