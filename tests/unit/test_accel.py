"""Choosing an accelerator and a vsock device by evidence."""

from __future__ import annotations

from pathlib import Path

import pytest

from image.vm import accel
from image.vm.errors import VMError

VMX = "flags\t\t: fpu vme vmx sse2\n"
SVM = "flags\t\t: fpu svm sse2\n"
NEITHER = "flags\t\t: fpu sse2\nbugs\t\t: svm_looks_like_a_flag\nmodel name\t: vmx processor\n"


@pytest.fixture
def device(tmp_path: Path) -> Path:
    file = tmp_path / "kvm"
    file.touch()
    return file


@pytest.mark.parametrize("cpuinfo", [VMX, SVM])
def test_hardware_virtualization_means_kvm(device: Path, cpuinfo: str) -> None:
    assert accel.kvm_refusal(cpuinfo, "x86_64", device) is None


def test_a_device_that_opens_is_not_enough(device: Path) -> None:
    refusal = accel.kvm_refusal(NEITHER, "x86_64", device)
    assert refusal is not None
    assert "neither vmx nor svm" in refusal
    choice = accel.choose_accelerator("auto", NEITHER, device)
    assert choice.name == "tcg"
    assert refusal in choice.reason


def test_other_architectures_have_no_such_flags(device: Path) -> None:
    assert accel.kvm_refusal("", "aarch64", device) is None


def test_no_device_means_emulation(tmp_path: Path) -> None:
    choice = accel.choose_accelerator("auto", VMX, tmp_path / "none")
    assert choice.name == "tcg"
    assert "No such file" in choice.reason


def test_what_is_asked_for_is_taken(device: Path) -> None:
    assert accel.choose_accelerator("tcg", VMX, device).name == "tcg"
    assert accel.choose_accelerator("kvm", NEITHER, device).name == "kvm"


def test_what_cannot_be_done_names_the_way_out(tmp_path: Path) -> None:
    with pytest.raises(VMError, match="modprobe kvm"):
        accel.choose_accelerator("kvm", VMX, tmp_path / "none")
    with pytest.raises(VMError, match="modprobe vhost_vsock"):
        accel.choose_vsock("vhost", tmp_path / "none")


@pytest.mark.parametrize("choose", [accel.choose_accelerator, accel.choose_vsock])
def test_other_words_are_refused(choose: object) -> None:
    with pytest.raises(VMError, match="auto"):
        choose("xen")  # type: ignore[operator]


def test_vsock_follows_the_device(device: Path, tmp_path: Path) -> None:
    assert accel.choose_vsock("auto", device).name == "vhost"
    assert accel.choose_vsock("user", device).name == "user"
    missing = accel.choose_vsock("auto", tmp_path / "none")
    assert missing.name == "user"
    assert "No such file" in missing.reason
