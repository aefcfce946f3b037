"""Measure boots to the responses a host waits for: our guests against a static C init on the same kernel.

    python -m tests.bench.boot [--rounds N]

Prints rows as JSON.  The time is what a user sees: from the start of the QEMU process, as recorded by the kernel, to
the response of Health.Check through the VM's agent.sock, and then to that of CreateSandbox; for the C init, to its
answer through the same socket, or to its marker on the serial console if vsock is a module of the kernel.  Guests boot
in turn.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from caisson.agent import client
from caisson.agent.rpc.ttrpc.blocking import BlockingClient
from caisson.image.build.definition import host_architecture
from caisson.image.formats import initrd
from caisson.image.formats.scan import merge_directories
from caisson.image.formats.tree import Node
from caisson.image.vm import VM, VMConfig
from caisson.proto.kata3 import agent_pb2
from tests.bench.rows import Row
from tests.bench.runtime_latency import ROOT
from tests.e2e.conftest import built

ROUNDS = 7
SOURCE_BUDGET, PREBUILT_BUDGET, ARM64_BUDGET = 5.0, 2.0, 3.5
SOURCE_SANDBOX_BUDGET, PREBUILT_SANDBOX_BUDGET = 1.8, 1.6
MARKER = b"caisson-bench-init"

#: The image with a custom kernel: as small and fast as any, with its peers included.
LEAN = (
    "--template", "lean", "--set", "format=erofs",
    "--set", "packages+=[crun, runc]", "--set", "wheels+=[grpcio==1.85.1, typing_extensions==4.16.0]",
    "--set", "keep+=[usr/bin/crun, usr/bin/runc, usr/sbin/runc]",
)  # fmt: skip


def minimal(image: Path, work: Path) -> Path:
    """Build an image with another's kernel and kernel parameters, and nothing but the C init."""
    target = work / f"minimal-{image.name}"
    target.mkdir()
    program = work / "init"
    document = json.loads((image / "image.json").read_text())
    compiler = ["musl-gcc", "-idirafter", "/usr/include", *headers()]
    if document["arch"] != host_architecture():
        compiler = ["aarch64-linux-gnu-gcc"]
    subprocess.run([*compiler, "-static", "-O2", "-o", program, ROOT / "tests/bench/init.c"], check=True)
    shutil.copy(image / document["kernel"]["file"], target)
    document["root"] = {"file": "initrd.img", "format": "initrd"}
    files = {**initrd.CONSOLE, "init": Node.of(0o100755, program.read_bytes())}
    with (target / "initrd.img").open("wb") as archive, merge_directories([], files) as tree:
        initrd.write_cpio(archive, tree)
    (target / "image.json").write_text(json.dumps(document))
    return target


def headers() -> list[str]:
    """Return the directory of the kernel headers for musl's compiler: Debian splits off those of an architecture."""
    triplet = subprocess.run(["gcc", "-print-multiarch"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()
    return ["-idirafter", f"/usr/include/{triplet}"] if triplet else []


def init_answers(path: Path) -> bool:
    """Return whether the C init sends a byte back."""
    with socket.socket(socket.AF_UNIX) as stream, contextlib.suppress(OSError):
        stream.settimeout(1.0)
        stream.connect(str(path))
        stream.sendall(b"P")
        return stream.recv(1) == b"P"
    return False


def init_prints(path: Path) -> bool:
    """Return whether the C init's marker is on the console."""
    console = path.parent / "console.log"
    return console.exists() and MARKER in console.read_bytes()


class SandboxProbe:
    """Wait for the response of Health.Check, then for that of CreateSandbox: the VM's `ready` probe.

    ``create_seconds`` is the time between the two.
    """

    def __init__(self) -> None:
        self._serves = client.ReadinessProbe()
        self.create_seconds = 0.0

    def __call__(self, path: Path) -> bool:
        if not self._serves(path):
            return False
        began = time.monotonic()
        caller = BlockingClient.connect(path)
        request = agent_pb2.CreateSandboxRequest(sandbox_id="bench")
        caller.call("grpc.AgentService", "CreateSandbox", request.SerializeToString())
        self.create_seconds = time.monotonic() - began
        caller.close()
        return True


def since_start(pid: int) -> float:
    """Return the seconds since a process started (proc(5), field 22)."""
    ticks = int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


@contextlib.contextmanager
def booted(config: VMConfig, ready: Callable[[Path], bool]) -> Iterator[tuple[VM, float]]:
    """Boot a VM; yield it, and the seconds until it was ready."""
    answered = 0.0

    def asked(path: Path) -> bool:
        nonlocal answered
        if ready(path):
            answered = time.clock_gettime(time.CLOCK_BOOTTIME)
        return bool(answered)

    with VM.start(config, ready=asked) as vm:
        took = since_start(vm.info["pids"]["qemu"])
        yield vm, took - (time.clock_gettime(time.CLOCK_BOOTTIME) - answered)


def measure(rounds: int, work: Path) -> list[Row]:
    """Return the rows."""
    lean, prebuilt, arm64 = built(*LEAN), built(), built("--arch", "arm64")
    guests: dict[str, tuple[Path, Callable[[Path], bool]]] = {
        "lean": (lean, SandboxProbe()),
        "lean-limit": (minimal(lean, work), init_answers),
        "prebuilt": (prebuilt, SandboxProbe()),
        "prebuilt-limit": (minimal(prebuilt, work), init_prints),
        "arm64": (arm64, client.ReadinessProbe()),
        "arm64-limit": (minimal(arm64, work), init_prints),
    }
    times: dict[str, list[float]] = {}
    for _ in range(rounds):
        for name, (image, ready) in guests.items():
            with booted(VMConfig(image, name="bench"), ready) as (_, seconds):
                if isinstance(ready, SandboxProbe):
                    times.setdefault(f"{name}-sandbox", []).append(seconds)
                    seconds -= ready.create_seconds
                times.setdefault(name, []).append(seconds)
    found = {name: statistics.median(each) for name, each in times.items()}
    return [
        Row.beside(f"boot to {what}, beside a C init (s)", found[name], found[limit], budget, found[limit])
        for name, limit, what, budget in (
            ("lean", "lean-limit", "Health.Check, own kernel", SOURCE_BUDGET),
            ("lean-sandbox", "lean-limit", "CreateSandbox's answer, own kernel", SOURCE_SANDBOX_BUDGET),
            ("prebuilt", "prebuilt-limit", "Health.Check, Debian's kernel", PREBUILT_BUDGET),
            ("prebuilt-sandbox", "prebuilt-limit", "CreateSandbox's answer, Debian's kernel", PREBUILT_SANDBOX_BUDGET),
            ("arm64", "arm64-limit", "Health.Check, arm64, Debian's kernel", ARM64_BUDGET),
        )
    ]


@contextlib.contextmanager
def own_run_directory() -> Iterator[Path]:
    """Create a run directory for this run only; short, because a Unix socket's path holds 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="caisson-", dir="/tmp") as directory:
        os.environ["CAISSON_RUN"] = directory
        yield Path(directory)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.boot", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="boots of each guest (default: %(default)s)")
    options = parser.parse_args()
    with own_run_directory(), tempfile.TemporaryDirectory(prefix="caisson-bench-") as work:
        rows = measure(options.rounds, Path(work))
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
