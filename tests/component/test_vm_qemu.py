"""Test the real QEMU, with a guest of three instructions or none."""

from __future__ import annotations

import os
import shutil
import signal
import struct
import time
from pathlib import Path

import pytest

from caisson.image.vm import VM, VMConfig, VMError, config, find_vm
from tests.component.fake_qemu import make_image, monitor_of, nothing_left

pytestmark = pytest.mark.skipif(shutil.which("qemu-system-x86_64") is None, reason="needs QEMU")

#: The address of the guest's code in memory, and its offset in the file.
ENTRY, OFFSET = 0x100000, 0x1000


def sleeping_kernel() -> bytes:
    """Return an ELF kernel with the PVH entry note (Xen, elfnote.h: XEN_ELFNOTE_PHYS32_ENTRY) that halts forever."""
    code = bytes.fromhex("fa f4 eb fc")  # cli; 1: hlt; jmp 1b - 1
    note = struct.pack("<III4sI", 4, 4, 18, b"Xen\0", ENTRY)
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\2\1\1", 2, 62, 1, ENTRY, 64, 0, 0, 64, 56, 2, 0, 0, 0
    )  # fmt: skip
    load = struct.pack("<IIQQQQQQ", 1, 5, OFFSET, ENTRY, ENTRY, len(code), len(code), 0x1000)
    remark = struct.pack("<IIQQQQQQ", 4, 4, 64 + 2 * 56, 0, 0, len(note), len(note), 4)
    return (header + load + remark + note).ljust(OFFSET, b"\0") + code


@pytest.fixture
def image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("CAISSON_RUN", str(tmp_path / "r"))
    directory = make_image(tmp_path / "image")
    (directory / "k").write_bytes(sleeping_kernel())
    (directory / "i").write_bytes(b"\0" * 512)
    return directory


def start(image: Path, *, ready: bool = True, memory: int = 128, timeout: float = 30) -> VM:
    config = VMConfig(image, name="v", accel="tcg", vsock="user", memory=memory)
    return VM.start(config, ready=lambda _: ready, timeout=timeout)


@pytest.mark.parametrize("kernel", [b"", b"no kernel".ljust(4096, b"\0"), b"\x7fELF".ljust(4096, b"\1")])
def test_a_kernel_that_is_none_is_quoted(image: Path, tmp_path: Path, kernel: bytes) -> None:
    (image / "k").write_bytes(kernel)
    with pytest.raises(VMError, match=r"^VM 'v': QEMU exited with status 1\nQEMU says:\nqemu.*(kernel|elf)"):
        start(image, ready=False)
    nothing_left(tmp_path / "r")


def test_memory_that_is_not_there_is_quoted(image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(config, "memory_of_host", lambda: 1 << 40)
    with pytest.raises(VMError, match="Cannot allocate memory"):
        start(image, ready=False, memory=1 << 30)
    nothing_left(tmp_path / "r")


def test_a_guest_that_never_says_a_word(image: Path, tmp_path: Path) -> None:
    with pytest.raises(VMError, match="did not answer within 1 s; the guest printed nothing"):
        start(image, ready=False, timeout=0.6)
    nothing_left(tmp_path / "r")


def test_the_monitor_answers_and_quit_is_a_clean_end(image: Path, tmp_path: Path) -> None:
    with start(image) as vm:
        with monitor_of(vm.directory / "qmp.sock") as monitor:
            assert monitor.execute("query-status")["status"] == "running"
            assert monitor.execute("query-name") == {"name": "caisson-v"}
            monitor.execute("quit")
        vm.wait()
    nothing_left(tmp_path / "r")


def test_a_frozen_qemu_is_ended_nevertheless(image: Path, tmp_path: Path) -> None:
    vm = start(image)
    os.kill(vm.info["pids"]["qemu"], signal.SIGSTOP)
    vm.stop()
    nothing_left(tmp_path / "r")


@pytest.mark.parametrize("part", ["supervisor", "qemu", "vsock"])
def test_killed_while_it_starts(image: Path, tmp_path: Path, part: str) -> None:
    for moment in (0.0, 0.02, 0.04, 0.08):
        vm = start(image)  # QEMU is still loading its libraries now
        vm.detach()
        time.sleep(moment)
        os.kill(vm.info["pids"][part], signal.SIGKILL)
        nothing_left(tmp_path / "r")
        assert find_vm("v") is None
