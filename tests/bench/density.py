"""Run many guests on one machine: measure the memory of each, and the time to list and to stop all of them.

    python -m tests.bench.density [--clones N]

Prints rows as JSON.  Memory is the PSS of all of a VM's processes (proc(5)): shared pages are divided among the clones.
The clones are real, of a snapshot, and idle; the peer is a single one.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from caisson.agent import client
from caisson.image.vm import VM, VMConfig, list_vms
from caisson.image.vm.snapshot.snapshot import Snapshot
from tests.bench.boot import LEAN, booted, own_run_directory
from tests.bench.clones import MEMORY, saved
from tests.bench.rows import Row
from tests.e2e.conftest import built

CLONES, LISTINGS = 50, 5

#: Budgets: MiB of each idle clone out of COUNTED, and the time to list and stop all against that for one.
CLONE_BUDGET, LIST_BUDGET, STOP_BUDGET = 40.0, 2.0, 10.0

#: Number of clones at which memory is measured.
COUNTED = 20


def pss(vms: list[VM]) -> float:
    """Return the PSS of some VMs' processes, in MiB."""
    rollups = [Path(f"/proc/{pid}/smaps_rollup").read_text() for vm in vms for pid in vm.info["pids"].values()]
    return sum(int(found[1]) for text in rollups if (found := re.search(r"^Pss: +(\d+) kB", text, re.M))) / 1024


def command(*words: str) -> float:
    """Return the seconds that a command takes."""
    began = time.perf_counter()
    whole = [sys.executable, "-m", "caisson.commands.entry", *words]
    subprocess.run(whole, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=True)
    return time.perf_counter() - began


def listing() -> float:
    return statistics.median(command("list-vms") for _ in range(LISTINGS))


def start(snapshot: Snapshot, number: int) -> VM:
    vm = VM.start(VMConfig.clone(snapshot, name=f"bench{number}"), ready=client.ReadinessProbe())
    vm.detach()
    return vm


def measure(clones: int) -> list[Row]:
    """Return the rows."""
    lean, counted = built(*LEAN), min(clones, COUNTED)
    with booted(VMConfig(lean, name="bench", memory=MEMORY), client.ReadinessProbe()) as (vm, _):
        alone = pss([vm])
    with saved(lean, MEMORY) as snapshot:
        try:
            start(snapshot, 0)
            one = listing()
            stopped = command("stop-vm", "--all")
            vms = [start(snapshot, number) for number in range(counted)]
            each = pss(vms) / counted
            vms += [start(snapshot, number) for number in range(counted, clones)]
            many = listing()
            all_stopped = command("stop-vm", "--all")
        finally:
            for left in list_vms():
                left.stop()
    what = f"memory of each of {counted} idle clones, shared pages once (MiB)"
    return [
        Row("memory of an idle VM of 256 MiB on the host, PSS (MiB)", alone),
        Row(what, each, budget=CLONE_BUDGET if counted == COUNTED else None),
        Row.beside("the same, beside an idle VM that has booted", each, alone, 1.0),
        Row.beside(f"list-vms with {clones} VMs, beside one (s)", many, one, LIST_BUDGET),
        Row.beside(f"stop-vm --all of {clones} VMs, beside one (s)", all_stopped, stopped, STOP_BUDGET),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.density", description=__doc__.partition("\n")[0])
    parser.add_argument("--clones", type=int, default=CLONES, help="how many guests (default: %(default)s)")
    options = parser.parse_args()
    with own_run_directory():
        rows = measure(options.clones)
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
