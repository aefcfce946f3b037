"""Test what a container's state says about its init process."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from caisson.agent.libcontainer.container import Container
from caisson.agent.libcontainer.state import ProcessStat, State
from caisson.agent.libcontainer.state_directory import ContainerError
from tests.support.descriptors import no_descriptor_is_free

NO_RUNTIME: Any = None


def container(directory: Path, pid: int) -> Container:
    found = ProcessStat.read(pid)
    start = 0 if found is None else found.start_time
    return Container(NO_RUNTIME, str(directory), State("c", pid, start, "2026-11-29T00:00:00Z"))


def test_an_init_that_has_exited_is_not_running(tmp_path: Path) -> None:
    with subprocess.Popen(["true"]) as program:
        program.wait()
    for pid in (program.pid, -1):
        ended = container(tmp_path, pid)
        assert ended.status == "stopped"
        with pytest.raises(ContainerError, match="container not running"):
            ended.pidfd()


def test_an_init_is_not_taken_for_dead_for_lack_of_descriptors(tmp_path: Path) -> None:
    running = container(tmp_path, os.getpid())
    os.close(running.pidfd())
    assert running.status == "running"
    for ask in (running.pidfd, running.stat):
        with no_descriptor_is_free(), pytest.raises(OSError, match="Too many open files"):
            ask()
