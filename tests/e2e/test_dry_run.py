"""Test boot-vm --dry-run: the command that a VM runs, and one that runs by hand."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess

import pytest

from caisson.agent import client
from tests.e2e.conftest import TIMEOUT, Caisson
from tests.support.poll import wait_until

pytestmark = pytest.mark.vm


def test_it_is_what_a_vm_runs(vm: Caisson) -> None:
    done = vm("boot-vm", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr.decode()
    running = [re.sub(r"(,vhostfd=|,fd=)\d+|guest-cid=\d+", "", word) for word in vm.info("default")["command"]]
    would = [re.sub(r",path=\S*/device.sock|guest-cid=\d+", "", word) for word in json.loads(done.stdout)]
    assert would == running
    assert vm.info("default")["accel_reason"].encode() in done.stderr
    assert vm.info("default")["vsock_reason"].encode() in done.stderr


def test_it_runs_by_hand(own: Caisson) -> None:
    shown = own("boot-vm", "--dry-run", "--name", "by-hand", "--append", "agent.log=debug quiet")
    assert shown.returncode == 0, shown.stderr.decode()
    directory = own.run_directory / "by-hand"
    assert not directory.exists()
    (before,) = re.findall(r"in another shell: (.*)", shown.stderr.decode())
    make, _, backend = before.partition(" && ")
    subprocess.run(shlex.split(make), check=True)
    sockets = directory / ("device.sock" if "--listen" in backend else "agent.sock")
    with subprocess.Popen(["/bin/sh", "-c", f"exec {backend}"]) as device:
        try:
            wait_until(sockets.exists, "the device waits for QEMU")
            with subprocess.Popen(["/bin/sh", "-c", f"exec {shown.stdout.decode()}"]) as qemu:
                try:
                    wait_until(lambda: client.is_serving(directory / "agent.sock", 1.0), "the agent answers", TIMEOUT)
                finally:
                    qemu.terminate()
        finally:
            device.terminate()
    assert device.returncode in (0, -15)
    shutil.rmtree(directory)  # created by hand


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (("--json",), b"--json: needs --dry-run"),
        (("--dry-run", "--image", "/nowhere"), b"/nowhere"),
        (("--dry-run", "--memory", "1"), b"--memory 1: is out of range; give 128M to"),
    ],
)
def test_dry_run_rejects_what_boot_rejects(own: Caisson, words: tuple[str, ...], why: bytes) -> None:
    done = own("boot-vm", *words)
    assert done.returncode in (1, 2)
    assert done.stdout == b""
    assert why in done.stderr
