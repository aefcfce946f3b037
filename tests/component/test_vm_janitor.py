"""Test the janitor, after a process was killed at a precise moment."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from caisson.image.vm.directory import VMDirectory

ROOT = Path(__file__).resolve().parents[2]

#: Is killed midway, then waits for everything it has started: they become its parent's children.
PROGRAM = """
import ctypes, os, signal, subprocess, sys
from pathlib import Path
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.directory import janitor
PR_SET_CHILD_SUBREAPER = 36
ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1)
if os.fork() == 0:
    os.setsid()
    directory = VMDirectory(Path(sys.argv[1]))
    with janitor(directory):
        {then}
        os.kill(os.getpid(), signal.SIGKILL)
try:
    while True:
        os.wait()
except ChildProcessError:
    pass
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "r"
    path.mkdir(mode=0o700)
    monkeypatch.setenv("CAISSON_RUN", str(path))
    return path


def killed(directory: Path, then: str) -> None:
    """Run a program that is killed after an action, and wait until everything it has started has exited, too."""
    program = PROGRAM.format(then=then)
    subprocess.run([sys.executable, "-c", program, directory], cwd=ROOT, check=True, timeout=30)


@pytest.mark.parametrize(
    "then",
    [
        "pass",
        "directory.path.mkdir()",
        "lock = directory.create()",
        "lock = directory.create(); (directory.path / 'a/b').mkdir(parents=True); (directory.path / 'a/.b').touch()",
        "lock = directory.create(); directory.agent_socket.touch(); directory.console.touch()",
        "lock = directory.create(); child = subprocess.Popen(['sleep', '1000'])",
    ],
    ids=["nothing", "made", "locked", "full", "half removed", "child"],
)
def test_nothing_stays(run: Path, then: str) -> None:
    killed(run / "v", then)
    assert list(run.iterdir()) == []


def test_a_new_vm_of_the_same_name_is_not_touched(run: Path) -> None:
    directory = VMDirectory.of("v")
    with directory.create():
        directory.agent_socket.touch()
        killed(directory.path, "pass")
        assert directory.agent_socket.exists()


def test_somebody_elses_directory_is_not_touched(run: Path) -> None:
    (run / "documents").mkdir()
    (run / "documents/thesis").touch()
    killed(run / "documents", "pass")
    assert (run / "documents/thesis").exists()


def test_a_directory_without_our_mark_is_not_touched(run: Path, tmp_path: Path) -> None:
    """Such as a package manager's, which has a file `lock`; also if reached through a link."""
    (run / "dpkg").mkdir()
    (run / "dpkg/lock").touch()
    (run / "dpkg/status").touch()
    (run / "link").symlink_to(run / "dpkg")
    killed(run / "dpkg", "pass")
    killed(run / "link", "pass")
    assert sorted(path.name for path in (run / "dpkg").iterdir()) == ["lock", "status"]


@pytest.mark.parametrize("kind", ["link to a VM's", "lock by a link", "somebody else's", "somebody else's lock"])
def test_a_mark_in_the_wrong_place_is_none(run: Path, tmp_path: Path, kind: str) -> None:
    """The mark is no secret: it counts only in a directory and a file owned by this user, reached through no link."""
    if "somebody" in kind and os.geteuid() != 0:
        pytest.skip("needs another user's files")
    stale = VMDirectory.of("stale")
    stale.create().close()
    (stale.path / "kept").touch()
    if kind == "link to a VM's":
        stale.path.rename(tmp_path / "elsewhere")
        stale.path.symlink_to(tmp_path / "elsewhere")
    elif kind == "lock by a link":
        (stale.path / "lock").rename(tmp_path / "lock")
        (stale.path / "lock").symlink_to(tmp_path / "lock")
    else:
        os.chown(stale.path / ("lock" if "lock" in kind else "."), 12345, 12345)
    killed(stale.path, "pass")
    assert (stale.path / "kept").exists()


def test_directories_are_made_and_removed_one_at_a_time(run: Path) -> None:
    """A VM being created looks stale for a moment: cleaning up waits until that is over."""
    program = (
        "import sys; from pathlib import Path; from caisson.image.vm import directory\n"
        "with directory._exclusive(Path(sys.argv[1])):\n"
        "    print('in', flush=True); sys.stdin.read()"
    )
    VMDirectory.of("stale").create().close()
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", program, run], cwd=ROOT, stdin=pipe, stdout=pipe) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == b"in\n"
        threads = [
            threading.Thread(target=VMDirectory.of("stale").remove),
            threading.Thread(target=lambda: VMDirectory.of("new").create().close()),
        ]
        for thread in threads:
            thread.start()
            thread.join(0.2)
            assert thread.is_alive()
        assert [path.name for path in run.iterdir()] == ["stale"]
        holder.communicate(b"")
    for thread in threads:
        thread.join(30)
    assert [path.name for path in run.iterdir() if path.name != "new"] == []
