"""What nsexec is built as: small, static, hardened, and readable in one sitting."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.native.agent_support import ROOT

SOURCES = sorted((ROOT / "agent/nsexec").glob("*.c"))


def readelf(program: Path) -> str:
    return subprocess.run(["readelf", "-lWd", program], capture_output=True, text=True, check=True).stdout


def test_flags(tmp_path: Path) -> None:
    command = ["make", "-n", "-C", str(ROOT / "agent/nsexec"), f"BUILD={tmp_path}"]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    strict = {"-std=c11", "-Wall", "-Wextra", "-Werror"}
    hardened = {"-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-fstack-clash-protection", "-fcf-protection"}
    assert strict | hardened | {"musl-gcc", "-static", "-Wl,-z,relro,-z,now,-z,noexecstack"} <= set(words)
    assert {path.name for path in SOURCES} - {"fuzz.c", "faults.c"} == {word for word in words if word.endswith(".c")}


def test_the_program(nsexec_path: Path) -> None:
    assert nsexec_path.stat().st_size < 100_000
    told = readelf(nsexec_path)
    assert "INTERP" not in told and "NEEDED" not in told
    (stack,) = (line for line in told.splitlines() if "GNU_STACK" in line)
    assert " RW " in stack and "E" not in stack.split()[6]
    assert "GNU_RELRO" in told
    loaded = [line for line in told.splitlines() if line.strip().startswith("LOAD")]
    assert not [line for line in loaded if "RWE" in line]


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_a_file_says_what_it_is_for_and_is_not_long(source: Path) -> None:
    lines = source.read_text().splitlines()
    assert len(lines) <= 600
    assert source.name in "".join(lines[:2]) and lines[0].startswith("/*")
