"""Where containerd finds the shim's program after `caisson install-shim`."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.commands.pods import SHIM_PROGRAM, link_program


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, list[str]]:
    """The scripts of an installation, and the directories in which containerd looks."""
    scripts, path = tmp_path / "opt", [tmp_path / "sbin", tmp_path / "bin"]
    for directory in (scripts, *path):
        directory.mkdir()
    (scripts / SHIM_PROGRAM).touch(mode=0o755)
    return scripts, [str(directory) for directory in path]


def test_a_program_that_containerd_would_not_find_is_linked(places: tuple[Path, list[str]]) -> None:
    scripts, path = places
    link = Path(path[1]) / SHIM_PROGRAM
    link.symlink_to("/of/an/installation/before")
    assert link_program(scripts, path) == f"{link}: linked to {scripts / SHIM_PROGRAM}"
    assert link.samefile(scripts / SHIM_PROGRAM)
    assert link_program(scripts, path) == f"{link}: is where containerd looks"


def test_a_program_that_is_no_link_stays(places: tuple[Path, list[str]]) -> None:
    scripts, path = places
    other = Path(path[1]) / SHIM_PROGRAM
    other.write_text("another")
    assert "file exists; containerd looks in " in link_program(scripts, path)
    assert other.read_text() == "another"


def test_a_program_that_is_not_installed_is_missed(tmp_path: Path) -> None:
    assert "not installed" in link_program(tmp_path, ["/usr/local/sbin", "/usr/local/bin"])
