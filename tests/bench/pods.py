"""Measure pod starts by Kata's remote hypervisor against a clone of the same snapshot; and the end of containers.

    python -m tests.bench.pods [--rounds N]

Prints rows as JSON.  A pod is started as by a Kata shim: CreateVM, StartVM with a shared directory, Health.Check and
CreateSandbox; the peer is the command `caisson boot-vm --snapshot`.  They take turns.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from caisson.image.build.cache import default_root
from tests.bench.rows import Row
from tests.e2e.conftest import ROOT, Caisson, built, fresh
from tests.shim.engine import rootfs
from tests.support.poll import wait_until
from tests.support.trees import unpacked

ROUNDS = 5
START_BUDGET = 1.5

#: Seconds.
REMOVE_BUDGET = 0.2


def pod(socket: Path, root: Path, number: int) -> dict[str, Any]:
    """Start and stop a pod; return the times a shim would measure."""
    words = ["unshare", "--mount", "--propagation", "private", sys.executable, "-m", "tests.e2e.kata_shim"]
    words += [str(socket), str(root), f"bench{number}"]
    done = subprocess.run(words, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, check=True)
    return dict(json.loads(done.stdout.splitlines()[-1]))


def clone(caisson: Caisson, name: str) -> float:
    """Return the seconds of the command that starts a clone."""
    began = time.monotonic()
    started = caisson("boot-vm", "bench", "--snapshot", name, "--detach")
    seconds = time.monotonic() - began
    assert started.returncode == 0, started.stderr
    caisson("stop-vm", "bench")
    return seconds


def measure(rounds: int, caisson: Caisson, place: Path) -> list[Row]:
    """Return the rows."""
    unpacked(rootfs(), place / "root")
    name, socket = f"bench-pods-{os.getpid()}", place / "hypervisor.sock"
    saved = caisson("save-snapshot", name, "--image", str(built()), "--vsock", "user")
    assert saved.returncode == 0, saved.stderr
    service = caisson.start("hypervisor", "--socket", str(socket), "--snapshot", name, stderr=subprocess.DEVNULL)
    try:
        wait_until(socket.exists, "the service listens")
        clones, pods = [], []
        for number in range(rounds):
            clones.append(clone(caisson, name))
            pods.append(pod(socket, place / "root", number))
    finally:
        service.terminate()
        service.wait(60)
        shutil.rmtree(default_root() / "snapshots" / name)
    starts = statistics.median(one["start"] for one in pods)
    removals = statistics.median(one["remove second"] for one in pods)
    return [
        Row.beside("a pod's start by the hypervisor service, beside a clone's (s)", starts, statistics.median(clones),
                   START_BUDGET),
        Row("RemoveContainer of a container that has ended, in the guest (s)", removals, budget=REMOVE_BUDGET),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.pods", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="pods and clones (default: %(default)s)")
    options = parser.parse_args()
    with fresh() as caisson, tempfile.TemporaryDirectory(prefix="caisson-bench-") as place:
        rows = measure(options.rounds, caisson, Path(place))
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
