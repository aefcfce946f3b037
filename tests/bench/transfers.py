"""Measure transfers to and from a guest: stdin, `cp` and shared directories, against plain vsock and virtiofs.

    python -m tests.bench.transfers [--quick] [--stream GB]

Prints rows as JSON.  The peers are tests/guest/peer.c on a plain vsock connection, and a shell in the guest with its
own mount.  They take turns, in one guest with a custom kernel.
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
from collections.abc import Callable
from pathlib import Path

from caisson.agent import client
from caisson.agent.client import Agent, Container
from caisson.agent.client.caller import DEFAULT, INPUT_CHUNK
from caisson.agent.client.guest import Guest
from caisson.image.vm import VM, VMConfig
from tests.bench.boot import LEAN, booted, own_run_directory
from tests.bench.guest import CONSOLE, PLACE, RAW, Shell, copy_in, through_a_pipe
from tests.bench.native import MIB, bulk
from tests.bench.rows import Row
from tests.bench.vsock import from_guest, to_guest
from tests.e2e.conftest import built
from tests.e2e.vsock_host import compile_peer, dial

MEMORY = 1024
STDIN_BUDGET, COPY_BUDGET, SHARE_BUDGET, STREAM_BUDGET = 4.0, 2.0, 1.2, 1.3
TAG = "bench"

#: Bytes of a shared file: large, because the end of a program is reported by a call that is not the file system's.
SHARED = 96 * MIB

#: Paths of the copied file in the guest, whose file systems are in memory, and of the guest's own mount of a share.
FILE, MOUNTED = "/tmp/caisson-bench", f"{PLACE}/shared"


def seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def caisson(vm: VM, *words: str) -> None:
    """Run a command on the VM."""
    command = [sys.executable, "-m", "caisson.commands.entry", words[0], "--name", vm.name, *words[1:]]
    subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, check=True)


class Transfers:
    """A guest, with its own shell, a plain connection to it, and a shared directory."""

    def __init__(self, vm: VM, shell: Shell, shared: Path, size: int) -> None:
        self._vm = vm
        self._shell = shell
        self._shared = shared
        self._size = size
        self._turns = 0
        self._raw = dial(vm.vsock_socket, RAW)
        self._source, self._target = shared / "big", shared.parent / "back"
        self._source.write_bytes(os.urandom(size))
        (shared / "read").write_bytes(bytes(SHARED))

    def close(self) -> None:
        self._raw.close()

    def stdin(self) -> tuple[float, float, float]:
        """Return milliseconds per MiB: to a program's stdin, through plain vsock, and through vsock and a pipe."""
        raw = MIB / 1e3 / to_guest(self._raw, self._size)
        ours = asyncio.run(self._with_container(self._write)) * 1000 * MIB / self._size
        return ours, raw, raw + through_a_pipe(self._shell, self._size)

    def copy_in(self) -> tuple[float, float, float]:
        """Return seconds of `cp` into a container, plain vsock, and plain vsock with the guest writing the file."""
        raw = self._size / to_guest(self._raw, self._size) / 1e6
        written = self._guest(f"dd if=/dev/zero of={FILE}.own bs=1M count={self._size // MIB} 2>/dev/null; ")
        self._shell(f"rm {FILE}.own")
        ours = seconds(lambda: caisson(self._vm, "cp", str(self._source), f"{DEFAULT}:{FILE}"))
        return ours, raw, raw + written

    def copy_out(self) -> tuple[float, float, float]:
        """Return seconds of `cp` out of a container, plain vsock, and plain vsock with the file written here."""
        ours = seconds(lambda: caisson(self._vm, "cp", f"{DEFAULT}:{FILE}", str(self._target)))
        if self._target.read_bytes() != self._source.read_bytes():
            raise SystemExit("cp: what came back is not what was copied")
        raw = self._size / from_guest(self._raw, self._size) / 1e6
        written = seconds(lambda: self._target.write_bytes(bytes(self._size)))
        self._target.unlink()
        return ours, raw, raw + written

    def share_read(self) -> tuple[float, float]:
        """Return the seconds to read a file in a share, by a program in a container and one outside."""
        return self._shared_by(f"dd if={{}}/read of=/dev/null bs=1M count={SHARED // MIB}")

    def share_write(self) -> tuple[float, float]:
        """Return the seconds to write one, until it is complete on this machine."""
        return self._shared_by(f"dd if=/dev/zero of={{}}/written bs=1M count={SHARED // MIB} conv=fsync")

    def _shared_by(self, command: str) -> tuple[float, float]:
        """Time a command in a container and outside; they take turns being first, which finds less memory in use."""
        kinds: list[Callable[[], float]] = [
            lambda: asyncio.run(self._with_container(lambda one: self._run(one, command.format(f"/run/shared/{TAG}")))),
            lambda: self._guest(f"{command.format(MOUNTED)} 2>/dev/null"),
        ]
        found = [0.0, 0.0]
        self._turns += 1
        for number in (0, 1) if self._turns % 4 < 2 else (1, 0):
            self._forget()
            found[number] = kinds[number]()
        return found[0], found[1]

    def _forget(self) -> None:
        """Drop the guest's page cache, and remove written files."""
        (self._shared / "written").unlink(missing_ok=True)
        self._shell("sync; echo 3 >/proc/sys/vm/drop_caches")

    def _guest(self, script: str) -> float:
        return seconds(lambda: self._shell(script))

    async def _with_container(self, work: Callable[[Container], object]) -> float:
        async with Agent.connect(self._vm.agent_socket, "ttrpc") as agent:
            found: float = await work(agent.container(DEFAULT))  # type: ignore[misc]
            return found

    async def _write(self, container: Container) -> float:
        process = await container.exec(["/bin/sh", "-c", "exec dd of=/dev/null bs=1M"])
        data = bytes(INPUT_CHUNK)
        began = time.perf_counter()
        for _ in range(self._size // INPUT_CHUNK):
            await process.write(data)
        await process.close_stdin()
        assert await process.wait() == 0
        return time.perf_counter() - began

    async def _run(self, container: Container, command: str) -> float:
        process = await container.exec(["/bin/sh", "-c", f"read x; exec {command}"])
        began = time.perf_counter()
        await process.write(b"\n")
        assert await process.wait() == 0
        return time.perf_counter() - began


async def make_container(vm: VM) -> None:
    async with Guest(vm) as guest:
        await guest.container()


async def stream(vm: VM, size: int, least: int) -> Row:
    """Return the row of a long stream against a short one."""
    async with Agent.connect(vm.agent_socket, "ttrpc") as agent:
        container = agent.container(DEFAULT)
        short = await bulk(container, least)
        what = f"stdout by ttrpc, a stream of {size / 1e9:.0f} GB, beside one of {least / 1e6:.0f} MB (ms/MiB)"
        return Row.beside(what, await bulk(container, size), short, STREAM_BUDGET)


def measure(rounds: int, size: int, long: int, work: Path) -> list[Row]:
    """Return the rows: each the median of some rounds, the first of which warms up caches."""
    config = VMConfig(built(*LEAN), name="bench", memory=MEMORY, append=f"agent.debug_console_vport={CONSOLE}")
    shared = work / "shared"
    shared.mkdir()
    with booted(config, client.ReadinessProbe()) as (vm, _):
        asyncio.run(make_container(vm))
        asyncio.run(copy_in(vm, {"peer": compile_peer(work).read_bytes()}))
        shell = Shell(vm)
        shell(f"mount -o remount,exec /run; {PLACE}/peer vsock:{RAW} >/dev/null 2>&1 &")
        caisson(vm, "share", str(shared), "--writable", "--tag", TAG)
        shell(f"mkdir -p {MOUNTED} && mount -t virtiofs {TAG} {MOUNTED}")
        transfers = Transfers(vm, shell, shared, size)
        kinds = (transfers.stdin, transfers.copy_in, transfers.copy_out, transfers.share_read, transfers.share_write)
        found: list[list[tuple[float, ...]]] = [[kind() for kind in kinds] for _ in range(rounds + 1)]
        long_stream = [asyncio.run(stream(vm, long, size))] if long else []
        transfers.close()
        shell.close()
    stdin, into, out, read, write = (
        [statistics.median(column) for column in zip(*each, strict=True)] for each in zip(*found[1:], strict=True)
    )
    megabytes = f"{size / 1e6:.0f} MB"
    rows = [
        Row.beside("stdin in bulk to the guest, beside raw vsock (ms/MiB)", stdin[0], stdin[1], STDIN_BUDGET, stdin[2])
    ]
    for way, (ours, raw, least) in (("into a container", into), ("out of it", out)):
        what = f"cp, {megabytes} {way}, beside raw vsock and writing the file (s)"
        rows.append(Row.beside(what, ours, least, COPY_BUDGET, raw))
    for does, (ours, alone) in (("reads", read), ("writes", write)):
        what = f"share: a container {does} {SHARED / 1e6:.0f} MB, beside virtiofs alone (s)"
        rows.append(Row.beside(what, ours, alone, SHARE_BUDGET))
    return rows + long_stream


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.transfers", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="less, and fewer times")
    parser.add_argument("--stream", type=int, default=0, metavar="GB", help="of a long stream (default: none)")
    options = parser.parse_args()
    rounds, size = (2, 24 * MIB) if options.quick else (5, 96 * MIB)
    with own_run_directory(), tempfile.TemporaryDirectory(prefix="caisson-bench-") as work:
        rows = measure(rounds, size, options.stream * 10**9 // MIB * MIB, Path(work))
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
