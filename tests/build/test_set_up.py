"""Test tasks.py in a fresh checkout: it sets up its environment on all kinds of machines, and only once."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from caisson.proto.contract import VERSION
from tests.build.test_install import PIP_TIMEOUT
from tests.support.checkout import clean_environment, copy_sources

SET_UP = "caisson: setting up .venv\n"

pytestmark = pytest.mark.timeout(PIP_TIMEOUT)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy this checkout, without generated files, to a path with a space."""
    place = tmp_path_factory.mktemp("a place") / "caisson"
    copy_sources(place)
    return place


def run(*words: str | Path, **settings: str) -> tuple[str, str]:
    """Return a successful command's stdout and stderr."""
    environment = clean_environment() | settings
    done = subprocess.run(words, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout, done.stderr


def test_settings_of_pip_for_other_places_do_no_harm(checkout: Path) -> None:
    tasks = checkout / "tasks.py"
    shown, said = run(sys.executable, tasks, "--version", PIP_USER="1", PIP_TARGET="/nowhere", PIP_PREFIX="/nowhere")
    assert shown == f"caisson {VERSION}\n" and said.startswith(SET_UP)
    assert run(sys.executable, tasks, "--version") == (f"caisson {VERSION}\n", "")


def test_every_door_is_the_same(checkout: Path, tmp_path: Path) -> None:
    run(sys.executable, checkout / "tasks.py", "--version")
    programs = checkout / ".venv/bin"
    shown = [
        run(*words, "exec", "--help") for words in ((programs / "caisson",), (sys.executable, checkout / "tasks.py"))
    ]
    done = subprocess.run([programs / "invoke", "exec", "--help"], cwd=checkout, capture_output=True, text=True)
    assert shown[0] == shown[1] == (done.stdout, done.stderr)
    assert shown[0][0].startswith("Usage: caisson exec ")


def test_a_python_that_was_removed_upgraded_or_is_somebody_elses_is_replaced(checkout: Path) -> None:
    run(sys.executable, checkout / "tasks.py", "--version")
    python = checkout / ".venv/bin/python"
    target = python.readlink()
    python.unlink()
    python.symlink_to("/" + "n" * 300)  # stat(2) fails, though not with ENOENT: as in an inaccessible home
    shown, said = run(sys.executable, checkout / "tasks.py", "--version")
    assert shown == f"caisson {VERSION}\n" and said.startswith(SET_UP)
    assert python.readlink() == target


def test_other_requirements_are_installed_without_starting_anew(checkout: Path) -> None:
    run(sys.executable, checkout / "tasks.py", "--version")
    (checkout / ".venv/kept").touch()
    with (checkout / "constraints.txt").open("a") as constraints:
        constraints.write("# changed\n")
    assert run(sys.executable, checkout / "tasks.py", "--version")[1].startswith(SET_UP)
    assert (checkout / ".venv/kept").exists()
