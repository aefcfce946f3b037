"""Measure the agent on this machine, through its API, against crun and a grpc.aio server that does nothing.

    python -m tests.bench.native [--quick]

Prints rows as JSON.  The agent runs in the caller's mount namespace; this program and crun run in one without cgroup
v2, which crun 1.8 rejects in combination with v1 (see runtime_latency).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import grpc

from caisson.agent.client import Agent, Container
from caisson.agent.client.caller import OUTPUT_CHUNK
from caisson.agent.client.grpc_channel import CHANNEL_OPTIONS
from caisson.proto.kata1 import agent_pb2
from tests.bench import transports
from tests.bench.bare import SERVICE
from tests.bench.rows import Row
from tests.bench.runtime_latency import CONFIG, ROOT, limit
from tests.native.agent_support import RunningAgent
from tests.native.nsexec_support import make_rootfs

ECHO = ["/bin/echo", "x"]
MESSAGE = bytes(64)
MIB = 1 << 20
EXEC_BUDGET, ECHO_BUDGET, BULK_BUDGET = 1.0, 3.0, 2.0


class Crun:
    """A crun container in which to run programs."""

    def __init__(self, work: Path, rootfs: Path) -> None:
        bundle = work / "crun"
        bundle.mkdir()
        config = CONFIG | {"process": CONFIG["process"] | {"args": ["/bin/sleep", "1000000"]}}
        config["root"] = {"path": str(rootfs), "readonly": True}
        (bundle / "config.json").write_text(json.dumps(config))
        self._words = ["crun", "--root", str(work / "crun-state"), "--cgroup-manager=disabled"]
        subprocess.run(
            [*self._words, "run", "--detach", "--bundle", bundle, "bench"], check=True, stdin=subprocess.DEVNULL
        )

    def first_byte(self) -> float:
        """Return the milliseconds from the command to the first byte of its output."""
        began = time.perf_counter()
        with subprocess.Popen(
            [*self._words, "exec", "bench", *ECHO], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, bufsize=0
        ) as process:
            assert process.stdout is not None
            assert process.stdout.read(1) == b"x"
            took = (time.perf_counter() - began) * 1000
        return took

    def close(self) -> None:
        subprocess.run([*self._words, "delete", "--force", "bench"], check=True)


@contextmanager
def bare_server(work: Path) -> Iterator[Path]:
    """Start a server that does nothing; yield it and its socket."""
    path = work / "bare.sock"
    with subprocess.Popen(
        [sys.executable, "-m", "tests.bench.bare", path], cwd=ROOT, stdout=subprocess.PIPE
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        try:
            yield path
        finally:
            process.kill()


@asynccontextmanager
async def bare_calls(path: Path) -> AsyncIterator[Callable[[str, bytes], Awaitable[bytes]]]:
    """Return the methods of such a server."""
    async with grpc.aio.insecure_channel(f"unix:{path}", options=CHANNEL_OPTIONS) as channel:
        calls: dict[str, Any] = {name: channel.unary_unary(f"/{SERVICE}/{name}") for name in ("Nothing", "Bytes")}
        yield lambda name, data: calls[name](data)


async def timed(work: Awaitable[Any]) -> float:
    """Return the milliseconds that an awaitable takes."""
    began = time.perf_counter()
    await work
    return (time.perf_counter() - began) * 1000


async def first_byte(container: Container) -> float:
    """Return the milliseconds from ExecProcess to the first byte of the program's output."""
    began = time.perf_counter()
    process = await container.exec(ECHO)
    assert await anext(process.stdout()) == b"x\n"
    took = (time.perf_counter() - began) * 1000
    assert await process.wait() == 0
    return took


async def echo_times(
    container: Container, count: int, between: Callable[[], Awaitable[Any]]
) -> tuple[list[float], list[float]]:
    """Return the milliseconds of round trips through `cat`, and of calls between two of them."""
    ours, theirs = [], []
    process = await container.exec(["/bin/cat"])
    output = process.stdout()
    for number in range(count + 10):
        reading = asyncio.ensure_future(anext(output))
        peer = await timed(between())  # by now the read waits in the agent
        began = time.perf_counter()
        await asyncio.gather(process.write(MESSAGE), reading)
        if number >= 10:
            ours.append((time.perf_counter() - began) * 1000)
            theirs.append(peer)
        assert reading.result() == MESSAGE
    await process.close_stdin()
    assert await process.wait() == 0
    return ours, theirs


async def echo(container: Container) -> float:
    """Return the milliseconds of a round trip through `cat`: the median of some."""
    took, _ = await echo_times(container, 10, lambda: asyncio.sleep(0.01))
    return statistics.median(took)


async def bulk(container: Container, size: int) -> float:
    """Return the milliseconds per MiB of a program's output.

    The program must use little time itself: busybox's `head` copies byte by byte, which alone takes twice as long
    natively, and ten times as long under emulation, as the whole way from its pipe to here.
    """
    process = await container.exec(["/bin/sh", "-c", f"read x; exec dd if=/dev/zero bs=1M count={size // MIB}"])
    output, got = process.stdout(), 0
    began = time.perf_counter()
    await process.write(b"\n")
    async for data in output:
        got += len(data)
    took = (time.perf_counter() - began) * 1000
    assert got == size and await process.wait() == 0
    return took * MIB / size


async def raw_bulk(call: Callable[[str, bytes], Awaitable[bytes]], size: int) -> float:
    """Return the milliseconds per MiB of messages of the maximum size the agent may send."""
    began = time.perf_counter()
    for at in range(0, size, OUTPUT_CHUNK):
        piece = min(OUTPUT_CHUNK, size - at)
        assert len(await call("Bytes", b"%d" % piece)) == piece
    return (time.perf_counter() - began) * 1000 * MIB / size


async def measure(work: Path, running: RunningAgent, crun: Crun, samples: int, quick: bool) -> list[Row]:
    """Return all rows."""
    size = (32 if quick else 128) * MIB
    rows = []
    async with Agent.connect(running.socket) as agent:
        await agent.create_sandbox()
        container = await agent.create_container("bench", running.spec())
        await container.start()
        ours, theirs = [], []
        for number in range(samples + 3):
            pair = await first_byte(container), crun.first_byte()
            if number >= 3:  # the first ones warm up caches
                ours.append(pair[0])
                theirs.append(pair[1])
        pid = next(iter(await pids(agent)))
        least = limit(work / "limit", "exec", str(pid), samples)
        what = "ExecProcess by gRPC to first byte, beside crun exec (ms)"
        rows.append(Row.beside(what, statistics.median(ours), statistics.median(theirs), EXEC_BUDGET, least))
        with bare_server(work) as path:
            async with bare_calls(path) as call:
                echoes = await echo_times(container, samples * 10, lambda: call("Nothing", b""))
                what = "WriteStdin to echo in ReadStdout, beside an empty call (ms)"
                own, peer = map(statistics.median, echoes)
                rows.append(Row.beside(what, own, peer, ECHO_BUDGET))
                pairs = [(await bulk(container, size), await raw_bulk(call, size)) for _ in range(5)]
                own, peer = (statistics.median(column) for column in zip(*pairs, strict=True))
                rows.append(Row.beside("stdout by gRPC, beside bare unary calls (ms/MiB)", own, peer, BULK_BUDGET))
        rows += await transports.measure(running.socket, "bench", samples, size // 4, first_byte, echo, bulk)
        await container.remove()
    return rows


async def pids(agent: Agent) -> list[int]:
    """Return the pids of the container's processes."""
    answer = await agent.rpc.ListProcesses(agent_pb2.ListProcessesRequest(container_id="bench", format="json"))
    return [int(pid) for pid in json.loads(answer.process_list)]


def inside(*words: str, module: str) -> list[str]:
    """Return the command that runs a benchmark module in an environment in which crun 1.8 works."""
    script = 'umount -l /sys/fs/cgroup/unified 2>/dev/null; CAISSON_BENCH_INSIDE=1 exec "$@"'
    where = ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, "bench"]
    return [*where, sys.executable, "-m", module, *words]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.native", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples")
    options = parser.parse_args()
    if "CAISSON_BENCH_INSIDE" not in os.environ:
        done = subprocess.run(inside(*sys.argv[1:], module="tests.bench.native"), cwd=ROOT)
        sys.exit(done.returncode)
    outside = ["nsenter", f"--mount=/proc/{os.getppid()}/ns/mnt", f"--wd={ROOT}", "--"]
    with tempfile.TemporaryDirectory(prefix="caisson-bench-") as directory, ExitStack() as ends:
        work = Path(directory)
        rootfs = make_rootfs(work / "rootfs")
        subprocess.run(["make", "-s", "-C", ROOT / "agent/nsexec", f"BUILD={work}"], check=True)
        subprocess.run(["gcc", "-O2", "-static", "-o", work / "limit", ROOT / "tests/bench/limit.c"], check=True)
        running = RunningAgent(work, work / "nsexec", rootfs, "--log", "info", within=outside)
        ends.callback(running.stop)
        crun = Crun(work, rootfs)
        ends.callback(crun.close)
        rows = asyncio.run(measure(work, running, crun, 15 if options.quick else 60, options.quick))
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
