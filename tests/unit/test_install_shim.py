"""Test where containerd finds the shim's program after `caisson install-shim`."""

from __future__ import annotations

from pathlib import Path

import pytest

from caisson.commands.pods import SHIM_PROGRAM, link_program


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path, str]:
    """Return the scripts directory of an installation, the second one that containerd searches, and all of them."""
    scripts, first, second = (tmp_path / name for name in ("opt", "sbin", "bin"))
    for directory in (scripts, first, second):
        directory.mkdir()
    (scripts / SHIM_PROGRAM).touch(mode=0o755)
    return scripts, second, f"{first}:{second}"


def test_a_program_that_containerd_would_not_find_is_linked(places: tuple[Path, Path, str]) -> None:
    scripts, directory, _ = places
    link = directory / SHIM_PROGRAM
    link.symlink_to("/of/an/installation/before")
    assert link_program(*places) == f"{link}: linked to {scripts / SHIM_PROGRAM}"
    assert link.samefile(scripts / SHIM_PROGRAM)
    assert link_program(*places) == f"{link}: containerd finds it here"


def test_a_program_that_is_no_link_stays(places: tuple[Path, Path, str]) -> None:
    other = places[1] / SHIM_PROGRAM
    other.write_text("another")
    assert "file exists; containerd looks in " in link_program(*places)
    assert other.read_text() == "another"


def test_a_program_that_is_not_installed_is_missed(tmp_path: Path) -> None:
    assert "not installed" in link_program(tmp_path, Path("/usr/local/bin"), "/usr/local/sbin:/usr/local/bin")
