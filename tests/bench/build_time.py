"""Measure image builds, full and after a change of the agent, against mkosi if installed; and image verification.

    python -m tests.bench.build_time [--quick]

Packages are downloaded beforehand (both cache them), and so is the kernel: mkosi's image, a directory with only Python,
has none.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from unittest import mock

from caisson.image.build import builder, sources
from caisson.image.build.cache import Cache, default_root
from caisson.image.build.definition import load
from tests.bench.rows import Row

FULL_BUDGET, AGAIN_BUDGET, VERIFY_BUDGET = 0.4, 0.03, 1.2
WHOLE, AGAIN = "full build, packages cached, beside mkosi (s)", "build after a change of the agent, beside mkosi (s)"
VERIFY = "verify-image, beside a full build with the kernel's part (s)"


class NotMeasured(Exception):
    """The peer has no figure; the text is the reason."""


def timed(work: Callable[[], object]) -> float:
    began = time.monotonic()
    work()
    return time.monotonic() - began


def measure_ours() -> tuple[float, float, Row]:
    """Return the seconds for a full image in an empty cache, and for the next one with another version of the agent.

    The row is that of verify-image, which builds the kernel part as well.
    """
    downloads = default_root() / "apt"
    image = builder.Build(load()).image()  # now packages and kernel are cached
    with tempfile.TemporaryDirectory(dir=default_root(), prefix="bench-") as scratch:
        cache = Cache(Path(scratch))
        kernel = timed(lambda: builder.Build(load(), cache, downloads=downloads).kernel())
        whole = timed(lambda: builder.Build(load(), cache, downloads=downloads).image())
        with mock.patch.object(sources, "agent_version", lambda: "0.0.0"):
            again = timed(lambda: builder.Build(load(), cache, downloads=downloads).image())
    differing: list[str] = []
    verified = timed(lambda: differing.extend(builder.verify(load(), image)))
    if differing:
        raise SystemExit(f"{image.directory}: differs from a new build in {', '.join(differing)}")
    return whole, again, Row.beside(VERIFY, verified, kernel + whole, VERIFY_BUDGET)


def measure_mkosi() -> tuple[float, float]:
    """Return the same for mkosi: a directory with Python, then the same from its own cache."""
    with tempfile.TemporaryDirectory(prefix="mkosi-") as scratch:
        for name in ("cache", "output"):
            (Path(scratch) / name).mkdir()
        words = [
            "mkosi", "--distribution=debian", "--release=bookworm", "--format=directory", "--package=python3-minimal",
            "--bootable=no", "--output-dir=output", *mkosi_options(Path(scratch) / "cache"), "--force",
        ]  # fmt: skip

        def build(*more: str) -> float:
            return timed(lambda: subprocess.run([*words, *more], cwd=scratch, capture_output=True, check=True))

        try:
            build()  # downloads
            whole = build()
            build("--incremental")
            return whole, build("--incremental")
        except subprocess.CalledProcessError as error:
            raise NotMeasured(f"mkosi fails here: {error.stderr.decode(errors='replace').strip()[-200:]}") from error


def mkosi_options(cache: Path) -> list[str]:
    """Return options for this mkosi: Debian 12's 14 needs some for containers, and without a system bus."""
    version = re.search(r"\d+", subprocess.run(["mkosi", "--version"], capture_output=True, text=True).stdout)
    old = version is not None and int(version[0]) < 15
    return [f"--cache={cache}", "--nspawn-keep-unit"] if old else [f"--cache-dir={cache}"]


def rows(quick: bool) -> list[Row]:
    *mine, verify = measure_ours()
    try:
        if quick:
            raise NotMeasured("minutes of mkosi are not quick")
        if shutil.which("mkosi") is None:
            raise NotMeasured("mkosi is not installed")
        theirs = measure_mkosi()
    except NotMeasured as why:
        return [*(Row(f"{what}: {why}", own) for what, own in zip((WHOLE, AGAIN), mine, strict=True)), verify]
    return [
        Row.beside(WHOLE, mine[0], theirs[0], FULL_BUDGET),
        Row.beside(AGAIN, mine[1], theirs[1], AGAIN_BUDGET),
        verify,
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.build_time", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="without mkosi")
    print(json.dumps([row.plain() for row in rows(parser.parse_args().quick)]))


if __name__ == "__main__":
    main()
