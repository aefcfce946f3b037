"""Test walks through nested cgroups, on plain directories: by descriptors, however deep they are."""

from __future__ import annotations

import os
import resource
from pathlib import Path

import pytest

from caisson.agent.libcontainer.cgroups import files
from caisson.agent.libcontainer.cgroups.base import JoinFds

NAME = "x" * 250


@pytest.fixture
def nested(tmp_path: Path) -> Path:
    """Create sixty levels of long names, more than a path can hold; with a process in the innermost."""
    top = tmp_path / "top"
    top.mkdir()
    at = os.open(top, files.DIRECTORY)
    for _ in range(60):
        os.mkdir(NAME, dir_fd=at)
        below = os.open(NAME, files.DIRECTORY, dir_fd=at)
        os.close(at)
        at = below
    fd = os.open("cgroup.procs", os.O_WRONLY | os.O_CREAT, dir_fd=at)
    os.write(fd, b"7\n8\n")
    os.close(fd)
    os.close(at)
    return top


def test_a_process_below_paths_that_are_too_long_is_found(nested: Path) -> None:
    assert files.pids_in(str(nested)) == [7, 8]
    fd = files.open_around(str(nested), 8)
    assert [entry.name for entry in os.scandir(fd)] == ["cgroup.procs"]
    os.unlink("cgroup.procs", dir_fd=fd)
    os.close(fd)
    assert files.open_around(str(nested), 8) == -1
    assert files.remove_tree(str(nested))
    assert not nested.exists()


def test_a_descriptor_that_nobody_waited_for_is_closed(nested: Path) -> None:
    fd = files.open_around(str(nested), 8)
    JoinFds(str(nested), fd, [], owned=True)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fd)


def test_a_walk_has_few_descriptors_and_leaves_none(nested: Path) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (before + 8, hard))
        for _ in files.walk(str(nested)):
            break
        assert files.pids_in(str(nested)) == [7, 8]
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_what_is_gone_has_nobody_in_it_and_is_removed(tmp_path: Path) -> None:
    for path in (tmp_path / "gone", tmp_path / "gone" / "below"):
        assert files.pids_in(str(path)) == [] and files.remove_tree(str(path))


def test_a_link_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "other").mkdir()
    (tmp_path / "top").mkdir()
    (tmp_path / "top" / "link").symlink_to(tmp_path / "other")
    assert [name for _, _, name in files.walk(str(tmp_path / "top"))] == ["top"]


def test_a_list_that_is_cut_off_has_no_half_of_a_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cgroup.procs").write_text("12\n345\n")
    monkeypatch.setattr(files, "MAX_PROCS", 5)
    assert files.pids_in(str(tmp_path)) == [12]
