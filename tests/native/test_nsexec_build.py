"""Test the build of nsexec and the front: small, static, hardened, and readable in one sitting."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from caisson.agent.libcontainer.plan import wire
from tests.native.agent_support import ROOT

NSEXEC = ROOT / "agent/nsexec"
#: Limits for each program, by make target.
SOURCES = {"nsexec": sorted(NSEXEC.glob("*.c")), "front": sorted((NSEXEC / "front").glob("*.c"))}


def readelf(program: Path) -> str:
    return subprocess.run(["readelf", "-lWd", program], capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize("program", SOURCES)
def test_flags(tmp_path: Path, program: str) -> None:
    command = ["make", "-n", "-C", str(ROOT / "agent/nsexec"), f"BUILD={tmp_path}", program]
    words = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    strict = {"-std=c11", "-Wall", "-Wextra", "-Werror"}
    hardened = {"-fstack-protector-strong", "-D_FORTIFY_SOURCE=2", "-fstack-clash-protection", "-fcf-protection"}
    assert strict | hardened | {"musl-gcc", "-static", "-Wl,-z,relro,-z,now,-z,noexecstack"} <= set(words)
    built = {Path(word).name for word in words if word.endswith(".c")}
    assert {path.name for path in SOURCES[program]} - {"fuzz.c", "faults.c"} == built


def test_the_directory_may_have_blanks_and_colons_in_its_name(tmp_path: Path) -> None:
    name = " my project: a "
    sources = shutil.copytree(NSEXEC, tmp_path / name / "nsexec", ignore=shutil.ignore_patterns("build*", "*.o"))
    command = ["make", "-s", "-C", str(sources), "CFLAGS=-O0"]
    subprocess.run([*command, f"BUILD={sources}/build", "nsexec", "front"], check=True)
    assert {file.name for file in (sources / "build").iterdir()} == {"nsexec", "caisson-oci"}
    again = subprocess.run([*command, f"BUILD={sources}/build", "nsexec", "front"], capture_output=True, text=True)
    assert (again.returncode, again.stdout) == (0, "")
    assert [one.name for one in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("fixture", ["nsexec_path", "front_path"])
def test_the_program(request: pytest.FixtureRequest, fixture: str) -> None:
    program: Path = request.getfixturevalue(fixture)
    assert program.stat().st_size < 100_000
    told = readelf(program)
    assert "INTERP" not in told and "NEEDED" not in told
    (stack,) = (line for line in told.splitlines() if "GNU_STACK" in line)
    assert " RW " in stack and "E" not in stack.split()[6]
    assert "GNU_RELRO" in told
    loaded = [line for line in told.splitlines() if line.strip().startswith("LOAD")]
    assert not [line for line in loaded if "RWE" in line]


@pytest.mark.parametrize("source", [path for paths in SOURCES.values() for path in paths], ids=lambda path: path.name)
def test_a_file_says_what_it_is_for_and_is_not_long(source: Path) -> None:
    lines = source.read_text().splitlines()
    assert len(lines) <= 600
    assert max(len(line.expandtabs(8)) for line in lines) <= 120  # including comments, which clang-format leaves alone
    assert source.name in "".join(lines[:2]) and lines[0].startswith("/*")


@pytest.mark.skipif(shutil.which("clang-format") is None, reason="clang-format is not installed")
def test_sources_are_formatted_by_clang_format() -> None:
    names = [str(path.relative_to(NSEXEC)) for path in sorted(NSEXEC.rglob("*.[ch]"))]
    command = ["clang-format", "--dry-run", "--Werror", *names]
    done = subprocess.run(command, cwd=NSEXEC, capture_output=True, text=True)
    assert done.returncode == 0, f"run clang-format -i {' '.join(names)} in agent/nsexec:\n{done.stderr[:2000]}"


def enumerators(source: str, first: str) -> dict[str, int]:
    """Return the members of the enum that starts with `first`; none may have an expression for a value."""
    body = re.search(rf"enum \w*\s*{{\s*({first}\b.*?)}}", source, re.DOTALL)
    assert body is not None, first
    found: dict[str, int] = {}
    for member in re.sub(r"/\*.*?\*/", "", body[1], flags=re.DOTALL).split(","):
        name, _, value = (part.strip() for part in member.partition("="))
        if name:
            found[name] = int(value, 0) if value else max(found.values()) + 1
    return found


def defines(source: str, pattern: str) -> dict[str, int]:
    """Return numeric macros whose names match."""
    found = re.findall(rf"#define ({pattern}) (\w+)", source)
    return {name: int(value.rstrip("ul"), 0) for name, value in found}


PYTHON = {name: v for name, v in vars(wire).items() if name.isupper() and isinstance(v, int)}


def test_numbers_of_a_plan_are_the_same_in_c_and_python() -> None:
    header = (NSEXEC / "nsexec.h").read_text()
    steps = enumerators(header, "PLAN_VERSION")
    last = steps.pop("PLAN_END")
    assert {name.removeprefix("PLAN_"): value for name, value in steps.items()} == {
        name.removeprefix("PLAN_"): value for name, value in PYTHON.items() if 27400 <= value < last
    }
    assert defines(header, "MOUNT_\\w+") == {name: v for name, v in PYTHON.items() if name.startswith("MOUNT_")}
    assert defines(header, "PLAN_FORMAT") == {"PLAN_FORMAT": wire.VERSION}


def test_numbers_of_the_bootstrap_are_the_same_in_c_and_python() -> None:
    source, header, system = ((NSEXEC / name).read_text() for name in ("plan.c", "nsexec.h", "sys.h"))
    types = {name.removeprefix("BOOT_"): value for name, value in enumerators(source, "BOOT_CLONE_FLAGS").items()}
    assert {name: value for name, value in types.items() if name in PYTHON} == {
        name: value for name, value in PYTHON.items() if 27281 <= value < 27400
    }
    assert defines(header, "MESSAGE_\\w+") == {name: v for name, v in PYTHON.items() if name.startswith("MESSAGE_")}
    flags = defines(system, "NS_(?!ALL)\\w+")
    assert {name: flags[f"NS_{file.upper()}"] for name, (_, file) in wire.NAMESPACES.items()} == {
        name: flag for name, (flag, _) in wire.NAMESPACES.items()
    }
