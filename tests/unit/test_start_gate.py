"""Test the gate at which a created init waits, without an init."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from caisson.agent.libcontainer import faults
from caisson.agent.libcontainer.errors import LaunchError
from caisson.agent.libcontainer.process import gate
from caisson.agent.libcontainer.waits import BlockingWaits, complete


@pytest.fixture
def init() -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen(["sleep", "1000"]) as program:
        yield program
        program.kill()


@pytest.mark.parametrize("in_company", [False, True], ids=["fifo", "socket"])
def test_an_init_that_dies_while_it_is_started_is_an_error(
    in_company: bool, init: subprocess.Popen[bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "gate")
    _, its_own = gate.make(path, in_company=in_company)
    pidfd = os.pidfd_open(init.pid)

    def die(point: str) -> None:
        if point == "start_opened":
            os.close(its_own)
            init.kill()

    monkeypatch.setattr(faults, "reach", die)
    try:
        with pytest.raises(LaunchError, match="init died before it was started"):
            complete(gate.open_and_follow(path, init.pid, pidfd, BlockingWaits(), 10))
    finally:
        os.close(pidfd)


def test_an_error_at_the_gate_is_not_taken_for_an_earlier_start(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for path, message in (("none", "the container was started before"), ("file/gate", "not a directory")):
        with pytest.raises(LaunchError, match=message):
            complete(gate.open_and_follow(str(tmp_path / path), 0, -1, BlockingWaits(), 10))
