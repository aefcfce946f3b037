"""Measure clones, from snapshot to first response, against a cold boot of a static C init on the same kernel.

    python -m tests.bench.clones [--rounds N] [--memory MIB]

Prints rows as JSON.  The time is what a user sees, as in tests.bench.boot: from the start of the QEMU process to the
response of Health.Check; for a personalized clone, until identity, clock and random numbers are set, too.  A boot of
the same image shows what the snapshot saves.  They take turns, so that other load affects all of them.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from caisson.agent import client
from caisson.image.vm import VM, VMConfig
from caisson.image.vm.snapshot.snapshot import Snapshot, has_printed_ready
from tests.bench.boot import LEAN, booted, init_answers, minimal, own_run_directory
from tests.bench.rows import Row
from tests.e2e.conftest import built

ROUNDS, MEMORY = 7, 256
BUDGET, SETTLED_BUDGET = 1.6, 1.2
SETTLED = "a clone with name, clock and seed set, beside the bare clone (s)"


@contextmanager
def saved(image: Path, memory: int) -> Iterator[Snapshot]:
    """Save a snapshot of an image's running guest."""
    name = f"bench-{os.getpid()}"
    with VM.start(VMConfig(image, name="saved", memory=memory, savable=True), ready=has_printed_ready) as vm:
        vm.save(name)
    snapshot = Snapshot.load(name)
    assert snapshot is not None
    try:
        yield snapshot
    finally:
        shutil.rmtree(snapshot.directory)


def measure(rounds: int, memory: int, work: Path) -> list[Row]:
    """Return the rows."""
    lean = built(*LEAN)
    with saved(lean, memory) as snapshot:
        clone = VMConfig.clone(snapshot, name="bench")
        guests: dict[str, tuple[VMConfig, Callable[[Path], bool]]] = {
            "limit": (VMConfig(minimal(lean, work), name="bench", memory=memory), init_answers),
            "boot": (VMConfig(lean, name="bench", memory=memory), client.ReadinessProbe()),
            "clone": (clone, client.ReadinessProbe()),
            "settled": (clone, partial(client.is_personalized, hostname="bench")),
        }
        times: dict[str, list[float]] = {name: [] for name in guests}
        for _ in range(rounds):
            for name, (config, ready) in guests.items():
                with booted(config, ready) as (_vm, seconds):
                    times[name].append(seconds)
    found = {name: statistics.median(each) for name, each in times.items()}
    limit = found["limit"]
    what = "snapshot to Health.Check"
    return [
        Row.beside(f"{what}, beside a C init that boots (s)", found["clone"], limit, BUDGET, limit),
        Row.beside(f"{what} of a settled clone, beside a boot (s)", found["settled"], found["boot"], None, limit),
        Row.beside(SETTLED, found["settled"], found["clone"], SETTLED_BUDGET),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.clones", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of each (default: %(default)s)")
    parser.add_argument("--memory", type=int, default=MEMORY, help="MiB (default: %(default)s)")
    options = parser.parse_args()
    with own_run_directory(), tempfile.TemporaryDirectory(prefix="caisson-bench-") as work:
        rows = measure(options.rounds, options.memory, Path(work))
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
