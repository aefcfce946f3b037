"""Measure a user's first `exec`, from nothing or with an image but no VM, against the minimum.

    python -m tests.bench.first_exec [--rounds N] [--bare]

Prints rows as JSON.  Each is the whole command, `caisson exec -- true`.  With --bare the first one starts with an empty
cache: it downloads packages, so the network counts as well; its peer is the same build without downloads, and a boot.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from caisson.agent import client
from caisson.image.build import builder
from caisson.image.build.cache import Cache, default_root
from caisson.image.build.definition import load
from caisson.image.vm import VMConfig
from tests.bench.boot import booted, own_run_directory
from tests.bench.rows import Row
from tests.e2e.conftest import built

ROUNDS = 5
SECOND_BUDGET, FIRST_BUDGET = 1.3, 3.0


def exec_true(cache: Path | None = None) -> float:
    """Return the seconds of the command, which boots its own VM and stops it."""
    environment = os.environ | ({"CAISSON_CACHE": str(cache)} if cache else {})
    command = [sys.executable, "-m", "caisson.commands.entry", "exec", "--", "true"]
    began = time.perf_counter()
    subprocess.run(command, stdin=subprocess.DEVNULL, env=environment, check=True)
    return time.perf_counter() - began


def second(rounds: int) -> tuple[Row, float]:
    """Return the row with an existing image, and the duration of a boot."""
    image = built()
    ours, boots = [], []
    for _ in range(rounds):
        ours.append(exec_true())
        with booted(VMConfig(image, name="bench"), client.ReadinessProbe()) as (_, seconds):
            boots.append(seconds)
    boot = statistics.median(boots)
    what = "exec -- true with an image and no VM, beside a boot to Health.Check (s)"
    return Row.beside(what, statistics.median(ours), boot, SECOND_BUDGET, boot), boot


def first(boot: float) -> Row:
    """Return the row of a machine with nothing on it."""
    with tempfile.TemporaryDirectory(dir=default_root(), prefix="bench-") as scratch:
        ours = exec_true(Path(scratch))
    with tempfile.TemporaryDirectory(dir=default_root(), prefix="bench-") as scratch:
        began = time.perf_counter()
        builder.Build(load(), Cache(Path(scratch)), downloads=default_root() / "apt").image()
        least = time.perf_counter() - began + boot
    what = "exec -- true with nothing cached, beside a build without downloads and a boot (s)"
    return Row.beside(what, ours, least, FIRST_BUDGET, least)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.first_exec", description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=ROUNDS, help="of exec and boot (default: %(default)s)")
    parser.add_argument("--bare", action="store_true", help="also with an empty cache")
    options = parser.parse_args()
    with own_run_directory():
        row, boot = second(options.rounds)
        rows = [row, *([first(boot)] if options.bare else [])]
    json.dump([row.plain() for row in rows], sys.stdout)


if __name__ == "__main__":
    main()
