"""Test loading a device program while signals arrive (bpf(2), EAGAIN)."""

from __future__ import annotations

import errno
import os
from typing import Any

import pytest

from caisson.agent.base import syscalls
from caisson.agent.libcontainer.cgroups import device_program as devices


def fake_bpf(monkeypatch: pytest.MonkeyPatch, interrupted: int) -> list[int]:
    """Interrupt this many loads; record the commands requested."""
    commands: list[int] = []

    def bpf(command: int, attributes: Any) -> int:
        commands.append(command)
        if command == devices.BPF_PROG_LOAD and len(commands) <= interrupted:
            raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN), "bpf")
        return os.open("/dev/null", os.O_RDONLY)

    monkeypatch.setattr(syscalls, "bpf", bpf)
    monkeypatch.setattr(devices, "attached", lambda cgroup: [])
    return commands


def test_an_interrupted_load_is_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_bpf(monkeypatch, interrupted=3)
    devices.attach(3, [])
    assert commands == [devices.BPF_PROG_LOAD] * 4 + [devices.BPF_PROG_ATTACH]


def test_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = fake_bpf(monkeypatch, interrupted=10**6)
    with pytest.raises(BlockingIOError):
        devices.attach(3, [])
    assert len(commands) == devices.MAX_LOAD_TRIES
