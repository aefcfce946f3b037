"""Measure docker with our shim against docker with runc: run, exec, ten at once; shim start; memory of a pod.

    python -m tests.bench.shim [--rounds N]

Prints rows as JSON.  docker and containerd are the tests' own (tests/shim/engine.py).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from caisson.commands.pods import Pods
from tests.bench.rows import Row
from tests.shim.engine import RUNTIME, Engine, engine
from tests.shim.fake_containerd import FakeContainerd

ROUNDS = 5

#: How many containers are started at once, and the budget relative to one.
MANY, MANY_BUDGET = 10, 12.0

#: Budgets relative to runc, and for start, to a Python that does nothing; MiB of a pod's processes except QEMU.
RUN_BUDGET, EXEC_BUDGET, START_BUDGET, RESIDENT_BUDGET = 1.0, 2.0, 4.0, 60.0

MIB = 1 << 20


def median(work: Callable[[], object], rounds: int) -> float:
    """Return the median seconds; the first run does not count."""
    work()
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def docker(engine: Engine, *words: str) -> None:
    done = engine.docker(*words)
    assert done.returncode == 0, done.stderr


def run(engine: Engine, runtime: str) -> None:
    docker(engine, "run", "--rm", "--network", "none", "--runtime", runtime, "busybox", "true")


def clone(engine: Engine) -> None:
    """Start a VM as the shim does, and stop it."""
    pods = Pods(configuration=engine.place / "shim.toml")
    machine = pods.start("pod-bench", memory=0, cpus=0)
    machine.stop()


def resident(engine: Engine, container: str) -> float:
    """Return the MiB of the processes of a container's pod, except QEMU and virtiofsd."""
    full = engine.docker("inspect", "--format", "{{.Id}}", container).stdout.decode().strip()
    bundle = next(engine.place.glob(f"state/io.containerd.runtime.v2.task/*/{full}"))
    record = json.loads((bundle / "caisson.json").read_text())
    pids = json.loads((engine.run / record["machine"] / "vm.json").read_text())["pids"]
    counted = [record["shim"]["pid"], *(pids[name] for name in ("supervisor", "vsock") if pids.get(name))]
    pages = sum(int(Path(f"/proc/{pid}/statm").read_text().split()[1]) for pid in counted)
    return pages * 4096 / MIB


def with_docker(rounds: int) -> list[Row]:
    with engine() as made:
        ours, runc = (median(partial(run, made, name), rounds) for name in (RUNTIME, "runc"))
        limit = median(lambda: clone(made), rounds)
        rows = [Row.beside("docker run --rm true, beside a clone + 2 x runc (s)", ours, limit + 2 * runc, RUN_BUDGET)]
        for name, runtime in (("ours", RUNTIME), ("runc", "runc")):
            options = ("--detach", "--name", name, "--network", "none", "--runtime", runtime)
            docker(made, "run", *options, "busybox", "sleep", "1000")
        exec_ours, exec_runc = (
            median(partial(docker, made, "exec", name, "true"), rounds) for name in ("ours", "runc")
        )
        rows.append(Row.beside("docker exec true (s)", exec_ours, exec_runc, EXEC_BUDGET))
        rows.append(
            Row("resident memory of shim, supervisor and device (MiB)", resident(made, "ours"), budget=RESIDENT_BUDGET)
        )
        began = time.perf_counter()
        with ThreadPoolExecutor(MANY) as pool:
            list(pool.map(lambda _: run(made, RUNTIME), range(MANY)))
        rows.append(
            Row.beside(f"{MANY} x docker run at once, beside one (s)", time.perf_counter() - began, ours, MANY_BUDGET)
        )
        return rows


async def _started(place: Path, rounds: int) -> float:
    times = []
    async with FakeContainerd(place, Path("/nonexistent"), place) as containerd:
        for number in range(rounds + 1):
            began = time.perf_counter()
            task = await containerd.start(f"c{number}", "true", version=2)
            times.append(time.perf_counter() - began)
            await task.call("Shutdown")
            await containerd.delete_program(task)  # waits for the pod, which has begun
    return statistics.median(times[1:])


def start(rounds: int) -> Row:
    """Return the row of the shim's `start`, from exec to the end of its output."""
    with tempfile.TemporaryDirectory(prefix="cs-") as place:
        ours = asyncio.run(_started(Path(place), rounds))
    nothing = median(lambda: subprocess.run([sys.executable, "-I", "-c", "pass"], check=True), rounds)
    return Row.beside("the shim's start, beside python3 -I -c pass (s)", ours, nothing, START_BUDGET)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.shim", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each (default: %(default)s)")
    options = parser.parse_args()
    rows = [start(options.rounds), *with_docker(options.rounds)]
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
