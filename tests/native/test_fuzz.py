"""Fuzz the parsers of nsexec and of the front, with AddressSanitizer and UndefinedBehaviorSanitizer.

With clang by libFuzzer, guided by coverage; if there is only gcc, by the mutator in fuzz.c.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.native import fuzz_corpus
from tests.native.agent_support import ROOT
from tests.support import fuzz

pytestmark = pytest.mark.root

SECONDS = int(fuzz.seconds(30))

#: Branches reached when every kind of attribute is: far fewer would mean that it is stuck at a header.
EDGES, FRONT_EDGES = 300, 150


def build(target: str, directory: Path) -> Path:
    """Build a target of nsexec's Makefile."""
    made = ["make", "-s", "-C", str(ROOT / "agent/nsexec"), f"BUILD={directory}", target]
    done = subprocess.run(made, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return directory / target


def finished(command: list[str], directory: Path) -> str:
    """Return a fuzzer's output; a finding fails the test, with the input that leads to it."""
    environment = os.environ | {"ASAN_OPTIONS": "detect_leaks=0", "UBSAN_OPTIONS": "print_stacktrace=1"}
    done = subprocess.run(
        command, capture_output=True, cwd=directory, env=environment, timeout=SECONDS + 200, errors="replace", text=True
    )
    found = {path.name: path.read_bytes()[:4096].hex() for path in directory.glob("found-*")}
    assert done.returncode == 0, f"{done.stderr[-6000:]}\n{done.stdout[-1000:]}\ninputs: {found}"
    return done.stderr + done.stdout


@pytest.mark.parametrize(
    ("target", "inputs", "least"),
    [("fuzz", fuzz_corpus.seeds, EDGES), ("fuzz-front", fuzz_corpus.front_seeds, FRONT_EDGES)],
    ids=["nsexec", "front"],
)
@pytest.mark.fuzz
@pytest.mark.timeout(fuzz.LIMIT)
def test_nothing_is_found(tmp_path: Path, target: str, inputs: Callable[[], dict[str, bytes]], least: int) -> None:
    seeds, corpus = tmp_path / "seeds", tmp_path / "corpus"
    for directory in (seeds, corpus):
        directory.mkdir()
    longest = fuzz_corpus.write(seeds, inputs())
    if shutil.which("clang") is None:
        assert "CI" not in os.environ, "CI fuzzes with clang: apt-get install clang libclang-rt-dev"
        program = build(f"{target}-gcc", tmp_path)
        good = [str(path) for path in sorted(seeds.iterdir()) if 200 < path.stat().st_size < 1 << 16]
        assert "accepted" in finished([str(program), str(SECONDS * 10_000), "1", *good], tmp_path)
        return
    program = build(target, tmp_path)
    # No RSS limit: libFuzzer reads ru_maxrss, which starts with pytest's peak (vfork, exec).
    said = finished(
        [str(program), f"-max_total_time={SECONDS}", f"-max_len={longest}", "-timeout=10", "-rss_limit_mb=0",
         "-malloc_limit_mb=64",
         "-print_final_stats=1", "-use_value_profile=1", "-artifact_prefix=found-", str(corpus), str(seeds)],
        tmp_path,
    )  # fmt: skip
    edges = max(map(int, re.findall(r"cov: (\d+)", said)))
    runs = int(re.findall(r"stat::number_of_executed_units: (\d+)", said)[0])
    print(f"{runs} inputs, {edges} edges")
    assert edges > least, said[-2000:]
    assert runs > 1000 * SECONDS / 10


@pytest.mark.parametrize(
    ("target", "inputs"),
    [("fuzz-gcc", fuzz_corpus.seeds), ("fuzz-front-gcc", fuzz_corpus.front_seeds)],
    ids=["nsexec", "front"],
)
def test_good_messages_are_accepted(tmp_path: Path, target: str, inputs: Callable[[], dict[str, bytes]]) -> None:
    """The fuzzer's seeds are what Python writes; otherwise it would look for errors in the wrong place."""
    program = build(target, tmp_path)
    files = []
    for name, data in inputs().items():
        if name.startswith("good"):
            files.append(tmp_path / name.replace(" ", "-"))
            files[-1].write_bytes(data)
    said = finished([str(program), "0", "1", *map(str, files)], tmp_path)
    assert said == f"{len(files)} accepted\n"
