"""Swap directories of the image for links, continually, while containers are created from it.

Each mount lands inside or the create fails; outside nothing appears, not even an empty file.  runc has had one such
race after another: CVE-2019-19921, CVE-2021-30465, CVE-2024-45310, CVE-2025-52881.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.errors import LaunchError
from tests.native.nsexec_support import Box, config

pytestmark = pytest.mark.root

ROUNDS = 150
SWAPPER = r"""
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdio.h>
#include <sys/prctl.h>
#include <signal.h>
int main(int argc, char **argv)
{
	unsigned long count = 0;
	prctl(PR_SET_PDEATHSIG, SIGKILL);
	for (; argc == 3; count++)
		if (renameat2(AT_FDCWD, argv[1], AT_FDCWD, argv[2], RENAME_EXCHANGE) < 0) {
			perror("renameat2");
			return 1;
		}
	return 2;
}
"""


@pytest.fixture(scope="module")
def swapper(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("swapper")
    (directory / "swapper.c").write_text(SWAPPER)
    subprocess.run(["gcc", "-O1", "-o", directory / "swapper", directory / "swapper.c"], check=True)
    return directory / "swapper"


@contextmanager
def exchanging(swapper: Path, one: Path, other: Path) -> Iterator[None]:
    """Swap two names continually while the block runs."""
    process = subprocess.Popen([swapper, one, other], stderr=subprocess.PIPE)
    try:
        yield
        assert process.poll() is None, "the swapper stopped early"
    finally:
        process.kill()
        process.communicate()


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """Provide a directory in which nothing may appear."""
    path = tmp_path / "outside"
    (path / "dst").mkdir(parents=True)
    (path / "file").write_text("canary")
    return path


def untouched(outside: Path) -> None:
    assert sorted(path.name for path in outside.rglob("*")) == ["dst", "file"]
    assert (outside / "file").read_text() == "canary"
    assert str(outside) not in Path("/proc/self/mountinfo").read_text()


def repeat(box: Box, value: Callable[[], dict[str, Any]], check: Callable[[str], None]) -> tuple[int, int]:
    """Create containers one after another; return how many ran, and how many were rejected."""
    ran = refused = 0
    for _ in range(ROUNDS):
        try:
            status, out, err = box.run(box.output(value()))
        except LaunchError:
            refused += 1
            continue
        assert status == 0, err
        check(out)
        ran += 1
    return ran, refused


@pytest.mark.parametrize("absolute", [True, False])
@pytest.mark.parametrize("destination", ["/vol/dst", "/vol/a/b/target", "/vol/a/file"])
def test_a_mounts_parent(box: Box, swapper: Path, outside: Path, destination: str, absolute: bool) -> None:
    (box.rootfs / "vol/dst").mkdir(parents=True)
    target = outside if absolute else Path("../../../../../../../..", *outside.parts[1:])
    (box.rootfs / "link").symlink_to(target)
    source = box.path / "source"
    source.write_text("bound")

    def value() -> dict[str, Any]:
        made = config("sh", "-c", f"grep -c ' /[^ ]*{destination.rpartition('/')[2]} ' /proc/self/mountinfo")
        made["mounts"].append(
            {"destination": destination, "type": "bind", "source": str(source), "options": ["bind"]}
            if destination.endswith("file")
            else {"destination": destination, "type": "tmpfs", "source": "tmpfs"}
        )
        return made

    def check(out: str) -> None:
        assert out == "1\n"  # it is inside, wherever that was at the time

    with exchanging(swapper, box.rootfs / "vol", box.rootfs / "link"):
        ran, _ = repeat(box, value, check)
    assert ran > 0
    untouched(outside)


def test_proc_itself(box: Box, swapper: Path, outside: Path) -> None:
    """A container runs with its masks and sysctls in the right place, or not at all."""
    (box.rootfs / "bad").symlink_to(outside)
    msgmax = Path("/proc/sys/kernel/msgmax").read_text()
    seen: set[str] = set()

    def value() -> dict[str, Any]:
        script = "stat -c %F /proc/timer_list; cat /proc/sys/kernel/msgmax; stat -fc %T /proc/self"
        made = config("sh", "-c", f"({script}) 2>/dev/null; true")
        made["linux"]["sysctl"] = {"kernel.msgmax": "12345"}
        return made

    def check(out: str) -> None:
        # The names are still being swapped: what cannot be found at the moment is reported as missing.
        assert set(out.splitlines()) <= {"character special file", "12345", "proc"}
        seen.update(out.splitlines())

    with exchanging(swapper, box.rootfs / "proc", box.rootfs / "bad"):
        ran, refused = repeat(box, value, check)
    assert ran > 0 and refused > 0
    assert seen == {"character special file", "12345", "proc"}
    assert Path("/proc/sys/kernel/msgmax").read_text() == msgmax
    untouched(outside)


def test_dev_itself(box: Box, swapper: Path, outside: Path) -> None:
    """Nodes and links in /dev appear inside or nowhere (CVE-2026-41579), and masks are correct."""
    (box.rootfs / "dev2").symlink_to(outside)
    (outside / "ptmx").write_text("not to be deleted")

    def value() -> dict[str, Any]:
        made = config("sh", "-c", "stat -c %t:%T /dev/null; stat -c %F /proc/timer_list")
        made["mounts"] = [mount for mount in made["mounts"] if not mount["destination"].startswith("/dev")]
        return made

    def check(out: str) -> None:
        assert out == "1:3\ncharacter special file\n"

    with exchanging(swapper, box.rootfs / "dev", box.rootfs / "dev2"):
        for _ in range(ROUNDS):
            try:
                status, out, _ = box.run(box.output(value()))
            except LaunchError:
                continue
            if status == 0 and out.startswith("1:3"):  # otherwise /dev was swapped again while it ran
                check(out)
    assert (outside / "ptmx").read_text() == "not to be deleted"
    (outside / "ptmx").unlink()
    untouched(outside)
