"""Measure a booted guest: exec against crun and runc, bulk output against raw vsock, memory and idle CPU time.

    python -m tests.bench.guest [--quick]

Prints rows as JSON.  The guest has the custom kernel, and crun and runc in its image (tests.bench.boot.LEAN).
Everything that runs beside the agent is started by a shell in the guest, on a vsock port.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import re
import resource
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

from caisson.agent import client
from caisson.agent.client import Agent, default_spec
from caisson.image.vm import VM, VMConfig
from caisson.proto.kata1 import agent_pb2, health_pb2
from tests.bench import transports
from tests.bench.boot import LEAN, booted, own_run_directory
from tests.bench.native import MIB, bulk, echo, first_byte
from tests.bench.rows import Row
from tests.bench.runtime_latency import CONFIG, ROOT
from tests.bench.vsock import cpu, from_guest
from tests.e2e.conftest import built
from tests.e2e.vsock_host import compile_peer, dial

CONSOLE, RAW = 1026, 2000
EXEC_BUDGET, BULK_BUDGET, MEMORY_BUDGET, MEMORY_RATIO, IDLE_BUDGET = 1.0, 2.0, 40.0, 1.3, 1.0
COMMAND_BUDGET = 4.0

#: Calls over which CPU time is measured: its unit is 10 ms.
CALLS = 100
PLACE = "/run/caisson-bench"
BUSYBOX = "/usr/lib/caisson/containers/busybox"
SHELL_TIMEOUT = 240.0
PEERS = ("crun", "runc")


class Shell:
    """A shell in the guest."""

    def __init__(self, vm: VM) -> None:
        self._socket = dial(vm.vsock_socket, CONSOLE)
        self._socket.settimeout(SHELL_TIMEOUT)
        self._got = b""
        self(f"PATH=$PATH:{BUSYBOX}/bin PS1= PS2=; stty -echo")

    def __call__(self, script: str) -> str:
        """Run a script; return its output."""
        # The marker is written so that the terminal's echo does not match it.
        self.begin(f"{script}\necho do'ne'-$?-")
        return self._until(rb"done-\d+-\r\n")

    def begin(self, text: str) -> None:
        """Send it a line, or start a program in it."""
        self._socket.sendall(text.encode() + b"\n")

    def line(self) -> str:
        """Return the next line."""
        return self._until(rb"\r\n")

    def ask(self, question: str) -> str:
        """Send a line, and return the answer."""
        self.begin(question)
        return self.line()

    def _until(self, end: bytes) -> str:
        while not (found := re.search(end, self._got)):
            data = self._socket.recv(1 << 16)
            if not data:
                raise SystemExit("the guest's shell has ended")
            self._got += data
        said, self._got = self._got[: found.start()], self._got[found.end() :]
        return said.decode().replace("\r\n", "\n")

    def close(self) -> None:
        self._socket.close()


def kib(text: str, field: str) -> int:
    """Return a value of smaps_rollup (proc(5))."""
    found = re.search(rf"^{field}: +(\d+) kB", text, re.M)
    if found is None:
        raise SystemExit(f"no {field} in {text!r}")
    return int(found[1])


def idle(vm: VM, seconds: float) -> float:
    """Return the CPU percentage of an idle VM: QEMU, the vsock device and the supervisor."""
    pids = vm.info["pids"].values()
    before, began = sum(map(cpu, pids)), time.monotonic()
    time.sleep(seconds)
    return 100 * (sum(map(cpu, pids)) - before) / (time.monotonic() - began)


def processor_time(*words: str) -> float:
    """Return the milliseconds of CPU time that a command takes on this machine."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(words, stdin=subprocess.DEVNULL, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return (after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime) * 1000


def whole_command(vm: VM, samples: int) -> Row:
    """Measure `exec -- true` from the shell's fork to the status, in a running container.

    CPU time, because the wall time would be mostly that of the emulated guest.
    """
    command = sys.executable, "-m", "caisson.commands.entry", "exec", "--name", vm.name, "--", "true"
    least = sys.executable, "-I", "-c", "pass"
    processor_time(*command)  # creates the container, and byte code
    pairs = [(processor_time(*command), processor_time(*least)) for _ in range(samples)]
    own, peer = (statistics.quantiles(column, n=4)[0] for column in zip(*pairs, strict=True))
    what = "processor time of a whole `exec -- true`, beside `python3 -I -c pass` (ms)"
    return Row.beside(what, own, peer, COMMAND_BUDGET)


def through_a_pipe(shell: Shell, size: int) -> float:
    """Return the milliseconds per MiB between two programs in the guest: the cost of output before it is sent."""
    began = time.perf_counter()
    shell(f"dd if=/dev/zero bs=1M count={size // MIB} 2>/dev/null | dd of=/dev/null bs=1M 2>/dev/null")
    return (time.perf_counter() - began) * 1000 * MIB / size


def memory(shell: Shell, agent_alone: str) -> list[Row]:
    """Return the agent's memory, and the RSS of a server that does nothing (its pages are shared with the agent)."""
    own = kib(agent_alone, "Pss") / 1024
    start = f"sys.path.append('/usr/lib/caisson'); sys.argv[1:] = ['{PLACE}/bare']"
    script = f"import sys, runpy; {start}; runpy.run_path('{PLACE}/bare.py', run_name='__main__')"
    python = "$(ls /usr/bin/python3.* | head -n1)"
    log = f"{PLACE}/bare.log"
    shell(f"{python} -IS -c {shlex.quote(script)} >{log} 2>&1 & until grep -q ready {log}; do sleep 0.1; done")
    bare = kib(shell("cat /proc/$!/smaps_rollup"), "Rss") / 1024
    shell("kill -9 $!")
    return [
        Row("memory of the idle agent in the guest, PSS (MiB)", own, None, bare, None, MEMORY_BUDGET),
        Row.beside("the same, beside a bare grpc.aio server", own, bare, MEMORY_RATIO),
    ]


async def call_cost(vm: VM, samples: int) -> Row:
    """Measure the CPU time of an empty call in QEMU, the vsock device and the client: other load does not affect it."""
    pids = vm.info["pids"].values()

    async def spent(agent: Agent) -> float:
        before = sum(map(cpu, pids)) + time.process_time()
        for _ in range(CALLS):
            await agent.health.Check(health_pb2.CheckRequest())
        return (sum(map(cpu, pids)) + time.process_time() - before) * 1000 / CALLS

    async with Agent.connect(vm.agent_socket, "ttrpc") as ours, Agent.connect(vm.agent_socket, "grpc") as peer:
        pairs = [(await spent(ours), await spent(peer)) for _ in range(samples + 1)]
    own, other = (statistics.quantiles(column, n=4)[0] for column in zip(*pairs[1:], strict=True))
    what = "in the guest: processor time of an empty call by ttrpc, beside the same by gRPC (ms)"
    return Row.beside(what, own, other, transports.CALL_BUDGET)


async def calls(vm: VM, shell: Shell, program: bytes, samples: int, size: int) -> list[Row]:
    """Measure exec and bulk output through the API."""
    async with Agent.connect(vm.agent_socket) as agent:
        await agent.create_sandbox()
        container = await agent.create_container("bench", default_spec(BUSYBOX))
        await container.start()
        config = CONFIG | {"process": CONFIG["process"] | {"args": ["/bin/sleep", "1000000"]}}
        words = shlex.join([f"{PLACE}/runtimes.py", BUSYBOX, json.dumps(config)])
        peers = Shell(vm)
        peers.begin(f"$(ls /usr/bin/python3.* | head -n1) -IS {words}")
        assert peers.line() == "ready"
        ours, theirs = [], {name: [] for name in PEERS}  # type: ignore[var-annotated]
        for number in range(samples + 2):
            took = await first_byte(container)
            said = {name: await asyncio.to_thread(peers.ask, name) for name in PEERS}
            if number >= 2:  # the first ones translate code
                ours.append(took)
                for name, text in said.items():
                    theirs[name].append(text)
        peers.close()
        rows = []
        for name, texts in theirs.items():
            what = f"ExecProcess in the guest to first byte, beside {name} exec there (ms)"
            try:
                peer = statistics.median(map(float, texts))
            except ValueError:
                rows.append(Row.missing(what, texts[0]))
            else:
                rows.append(Row.beside(what, statistics.median(ours), peer, EXEC_BUDGET))
        shell(f"mount -o remount,exec /run; {PLACE}/peer vsock:{RAW} >/dev/null 2>&1 &")
        raw = dial(vm.vsock_socket, RAW)
        taken = []
        for _ in range(6):
            rate = await asyncio.to_thread(from_guest, raw, size)  # MB/s
            pipe = await asyncio.to_thread(through_a_pipe, shell, size)
            taken.append((await bulk(container, size), MIB / 1e3 / rate, pipe + MIB / 1e3 / rate))
        raw.close()
        own, peer, least = (statistics.median(column) for column in zip(*taken[1:], strict=True))
        what = "stdout by gRPC from the guest, beside raw vsock (ms/MiB)"
        rows.append(Row.beside(what, own, peer, BULK_BUDGET, least))
        rows += [
            replace(row, what=f"in the guest: {row.what}")
            for row in await transports.measure(vm.agent_socket, "bench", samples, size // 4, first_byte, echo, bulk)
        ]
        rows.append(await call_cost(vm, samples))
        await container.remove()
    return rows


async def copy_in(vm: VM, files: dict[str, bytes]) -> None:
    async with Agent.connect(vm.agent_socket) as agent:
        for name, data in files.items():
            copy = agent_pb2.CopyFileRequest(
                path=f"{PLACE}/{name}", file_size=len(data), file_mode=0o100755, dir_mode=0o755, data=data
            )
            await agent.rpc.CopyFile(copy)


def measure(quick: bool, work: Path) -> list[Row]:
    """Return all rows."""
    program = compile_peer(work).read_bytes()
    config = VMConfig(built(*LEAN), name="bench", append=f"agent.debug_console_vport={CONSOLE}")
    with booted(config, client.ReadinessProbe()) as (vm, _):
        shell = Shell(vm)
        agent_alone = shell("cat /proc/1/smaps_rollup")
        used = idle(vm, 10 if quick else 30)
        here = ROOT / "tests/bench"
        files = {name: (here / name).read_bytes() for name in ("bare.py", "runtimes.py")}
        asyncio.run(copy_in(vm, files | {"peer": program}))
        rows = asyncio.run(calls(vm, shell, program, 8 if quick else 25, (16 if quick else 64) * MIB))
        rows += memory(shell, agent_alone)
        rows.append(whole_command(vm, 8 if quick else 25))
        shell.close()
    rows.append(Row("processor time of an idle VM (%)", used, budget=IDLE_BUDGET))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.guest", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    options = parser.parse_args()
    with own_run_directory(), tempfile.TemporaryDirectory(prefix="caisson-bench-") as work:
        rows = measure(options.quick, Path(work))
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
