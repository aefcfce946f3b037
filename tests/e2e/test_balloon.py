"""Test a guest that returns memory to the host, and gets it back."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.e2e.conftest import COMPILE_TIMEOUT, Caisson
from tests.support.poll import wait_until

pytestmark = pytest.mark.vm


def run(vm: Caisson, *words: str) -> str:
    done = vm(*words)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode()


def used(vm: Caisson) -> int:
    """Return the MiB of host memory used as a guest's memory: the blocks of QEMU's memfd."""
    for link in Path(f"/proc/{vm.info('default')['pids']['qemu']}/fd").iterdir():
        if "memfd:memory-backend-memfd" in str(link.readlink()):
            return link.stat().st_blocks // 2048
    raise AssertionError("QEMU has no memfd")


def fill_and_free(vm: Caisson) -> None:
    """Make a guest use 200 MiB of memory, and free them."""
    run(vm, "exec", "--", "sh", "-c", "head -c 200m /dev/zero >/tmp/large; rm /tmp/large")


def test_a_balloon_takes_memory_and_gives_it_back(vm: Caisson) -> None:
    fill_and_free(vm)
    before = used(vm)
    assert run(vm, "balloon", "200") == "200\n"
    assert used(vm) < before - 100
    (listed,) = json.loads(run(vm, "list-vms", "--json"))
    assert (listed["memory"], listed["memory_now"]) == (512, 200)
    assert "  200 MiB  " in run(vm, "list-vms")
    (free,) = run(vm, "exec", "--", "awk", "/MemFree/ { print $2 }", "/proc/meminfo").split()
    assert int(free) < 200 * 1024
    assert run(vm, "balloon", "512") == "512\n"
    fill_and_free(vm)


@pytest.mark.parametrize(
    ("size", "status", "why"),
    [("64", 2, b"SIZE 64: is out of range"), ("513", 1, b"not 513"), ("much", 2, b"SIZE much: is not a size")],
)
def test_balloon_rejects_impossible_sizes(vm: Caisson, size: str, status: int, why: bytes) -> None:
    done = vm("balloon", size)
    assert (done.returncode, done.stdout, done.stderr.count(b"\n")) == (status, b"", 1)
    assert why in done.stderr


@pytest.mark.timeout(COMPILE_TIMEOUT)
def test_a_kernel_of_our_own_hands_back_what_is_free(own: Caisson, lean: Path) -> None:
    run(own, "boot-vm", "--image", str(lean), "--detach", "--vsock", "user")
    run(own, "exec", "--", "true")
    before = used(own)
    run(own, "exec", "--", "sh", "-c", "head -c 200m /dev/zero >/tmp/large")
    assert used(own) > before + 100
    run(own, "exec", "--", "rm", "/tmp/large")
    wait_until(lambda: used(own) < before + 50, "free memory is returned to the host", found=lambda: used(own))
    run(own, "stop-vm")
