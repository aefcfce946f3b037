"""Run every benchmark against its peer and its limit, and print one table.

    python -m tests.bench [--quick] [--json] [--html FILE]

Each part is a separate program that prints its rows as JSON: some need their own mount namespace, and none affects the
next one's process.  A part that fails becomes a row that says so.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

from caisson.image.build.cache import default_root
from tests.bench import picture
from tests.bench.rows import Row, table
from tests.bench.runtime_latency import ROOT

#: Ratios of the last runs, in the cache.
HISTORY = "bench.jsonl"

#: Modules, with the arguments that make each of them quick.
PARTS = {
    "runtime_latency": (["--json"], ["--json", "--samples", "15"]),
    "native": ([], ["--quick"]),
    "boot": ([], ["--rounds", "2"]),
    "clones": ([], ["--rounds", "3"]),
    "pods": ([], ["--rounds", "2"]),
    "shim": ([], ["--rounds", "2"]),
    "guest": ([], ["--quick"]),
    "vsock": (["--json"], ["--json", "--quick"]),
    "transfers": (["--stream", "10"], ["--quick"]),
    "scale": ([], ["--containers", "200", "--execs", "200"]),
    "density": ([], ["--clones", "4"]),
    "first_exec": (["--bare"], ["--rounds", "1"]),
    "build_time": ([], ["--quick"]),
}


def measured(part: str, quick: bool) -> list[Row]:
    """Return the rows of one part."""
    whole, short = PARTS[part]
    command = [sys.executable, "-m", f"tests.bench.{part}", *(short if quick else whole)]
    done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    try:
        return [Row.from_plain(row) for row in json.loads(done.stdout)]
    except ValueError:
        return [Row.missing(part, f"python -m tests.bench.{part} failed with status {done.returncode}")]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="fewer samples: some minutes in all")
    parser.add_argument("--json", action="store_true", help="print a list of rows")
    parser.add_argument(
        "--html", type=Path, metavar="FILE", help="draw the rows, with those of the last runs beside them"
    )
    options = parser.parse_args()
    if options.html and not options.html.parent.is_dir():
        parser.error(f"--html {options.html}: there is no directory {options.html.parent}")
    rows: list[Row] = []
    for part in PARTS:
        print(f"measuring: {part}", file=sys.stderr)
        rows += measured(part, options.quick)
    print(json.dumps([row.plain() for row in rows], indent=1) if options.json else "\n".join(table(rows)))
    if options.html:
        runs = picture.remember(rows, default_root() / HISTORY)
        options.html.write_text(picture.page(rows, runs, "Caisson beside its peers"))
    sys.exit(any(row.passed is False for row in rows))


if __name__ == "__main__":
    main()
