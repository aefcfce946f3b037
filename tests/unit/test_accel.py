"""Test choosing an accelerator and a vsock device by evidence."""

from __future__ import annotations

import errno
from pathlib import Path

import pytest

from caisson.image.vm import accel
from caisson.image.vm.accel import Host
from caisson.image.vm.errors import VMError

VMX = "flags\t\t: fpu vme vmx sse2\n"
SVM = "flags\t\t: fpu svm sse2\n"
NEITHER = "flags\t\t: fpu sse2\nbugs\t\t: svm_looks_like_a_flag\nmodel name\t: vmx processor\n"


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Host:
    """Return a machine that has everything, with no decision yet on `auto`."""
    monkeypatch.delenv("CAISSON_ACCEL", raising=False)
    monkeypatch.delenv("CAISSON_VSOCK", raising=False)
    for name in ("kvm", "vhost-vsock"):
        (tmp_path / name).touch()
    return Host("x86_64", VMX, kvm=tmp_path / "kvm", vhost_vsock=tmp_path / "vhost-vsock")


@pytest.mark.parametrize("cpuinfo", [VMX, SVM])
def test_hardware_virtualization_means_kvm(host: Host, cpuinfo: str) -> None:
    choice = accel.choose_accelerator("auto", "x86_64", host.but(cpuinfo=cpuinfo))
    assert choice.name == "kvm"
    assert choice.doubt == ""


def test_a_device_that_opens_is_not_enough(host: Host) -> None:
    choice = accel.choose_accelerator("auto", "x86_64", host.but(cpuinfo=NEITHER))
    assert choice.name == "tcg"
    assert "opens, but the CPU shows neither vmx nor svm" in choice.reason


def test_other_architectures_have_no_such_flags(host: Host) -> None:
    assert accel.choose_accelerator("auto", "aarch64", host.but(machine="aarch64", cpuinfo="")).name == "kvm"


def test_no_device_means_emulation(host: Host, tmp_path: Path) -> None:
    choice = accel.choose_accelerator("auto", "x86_64", host.but(kvm=tmp_path / "none"))
    assert choice.name == "tcg"
    assert "No such file" in choice.reason


def test_a_device_that_another_hypervisor_uses_is_busy(host: Host) -> None:
    """VirtualBox uses the processor's virtualization exclusively: KVM_CREATE_VM fails."""

    def refuse(device: int) -> None:
        raise OSError(errno.EBUSY, "Device or resource busy")

    busy = host.but(create_vm=refuse)
    choice = accel.choose_accelerator("auto", "x86_64", busy)
    assert choice.name == "tcg"
    assert "is busy: another hypervisor" in choice.reason
    with pytest.raises(VMError, match=r"--accel kvm: .*kvm is busy: another hypervisor, .*; stop its VMs, or choose"):
        accel.choose_accelerator("kvm", "x86_64", busy)


def test_kvm_runs_its_own_architecture_only(host: Host) -> None:
    choice = accel.choose_accelerator("auto", "aarch64", host)
    assert choice.name == "tcg"
    assert "the image is for aarch64 and this machine is x86_64" in choice.reason
    with pytest.raises(VMError, match="--accel tcg"):
        accel.choose_accelerator("kvm", "aarch64", host)


def test_accelerator_asked_for_is_used(host: Host) -> None:
    assert accel.choose_accelerator("tcg", "x86_64", host).name == "tcg"
    assert accel.choose_accelerator("kvm", "x86_64", host).reason == "KVM, as requested"


def test_forced_accelerator_is_used_with_a_warning(host: Host) -> None:
    choice = accel.choose_accelerator("kvm", "x86_64", host.but(cpuinfo=NEITHER))
    assert choice.name == "kvm"
    assert "neither vmx nor svm" in choice.doubt
    assert choice.doubt in choice.reason


def test_unusable_accelerator_is_rejected_with_a_remedy(host: Host, tmp_path: Path) -> None:
    none = host.but(kvm=tmp_path / "none", vhost_vsock=tmp_path / "none")
    with pytest.raises(VMError, match=r"modprobe kvm.*--accel tcg"):
        accel.choose_accelerator("kvm", "x86_64", none)
    with pytest.raises(VMError, match=r"modprobe vhost_vsock.*--vsock user"):
        accel.choose_vsock("vhost", none)


@pytest.mark.parametrize(
    ("uid", "group", "mode", "way_in"),
    [
        (1000, "kvm", 0o660, "sudo usermod -aG kvm"),
        (1000, "kvm", 0o600, "sudo setfacl -m u:"),
        (1000, "root", 0o660, "sudo setfacl -m u:"),  # nobody should join that group
        (1000, None, 0o660, "sudo setfacl -m u:"),
        (0, "kvm", 0o660, "docker run --device"),
    ],
)
def test_a_device_that_one_may_not_open_names_the_way_in(
    host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, uid: int, group: str | None, mode: int, way_in: str
) -> None:
    def group_of(_: Path) -> str:
        if group is None:
            raise KeyError
        return group

    monkeypatch.setattr("os.geteuid", lambda: uid)
    monkeypatch.setattr(Path, "group", group_of)
    # Not even root can open a directory for writing.
    closed = host.but(kvm=tmp_path / "d", vhost_vsock=tmp_path / "d")
    (tmp_path / "d").mkdir()
    (tmp_path / "d").chmod(mode)
    with pytest.raises(VMError, match=way_in):
        accel.choose_accelerator("kvm", "x86_64", closed)
    with pytest.raises(VMError, match=way_in):
        accel.choose_vsock("vhost", closed)
    assert accel.choose_accelerator("auto", "x86_64", closed).name == "tcg"
    assert accel.choose_vsock("auto", closed).name == "user"


def test_ci_says_what_auto_is(host: Host, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CAISSON_ACCEL", "tcg")
    monkeypatch.setenv("CAISSON_VSOCK", "user")
    assert accel.choose_accelerator("auto", "x86_64", host).name == "tcg"
    assert accel.choose_accelerator("kvm", "x86_64", host).name == "kvm"  # an explicit request is honoured
    assert accel.choose_vsock("auto", host).name == "user"
    monkeypatch.setenv("CAISSON_ACCEL", "kvm")
    monkeypatch.setenv("CAISSON_VSOCK", "vhost")
    none = host.but(kvm=tmp_path / "none", vhost_vsock=tmp_path / "none")
    with pytest.raises(VMError, match="--accel kvm"):
        accel.choose_accelerator("auto", "x86_64", none)
    with pytest.raises(VMError, match="--vsock vhost"):
        accel.choose_vsock("auto", none)


def test_other_words_are_refused(host: Host) -> None:
    with pytest.raises(VMError, match="auto, kvm or tcg"):
        accel.choose_accelerator("xen", "x86_64", host)
    with pytest.raises(VMError, match="auto, vhost or user"):
        accel.choose_vsock("tcp", host)


def test_vsock_follows_the_device(host: Host, tmp_path: Path) -> None:
    assert accel.choose_vsock("auto", host).name == "vhost"
    assert accel.choose_vsock("vhost", host).name == "vhost"
    assert accel.choose_vsock("user", host).name == "user"
    missing = accel.choose_vsock("auto", host.but(vhost_vsock=tmp_path / "none"))
    assert missing.name == "user"
    assert "No such file" in missing.reason


def test_this_machine_is_looked_at() -> None:
    host = Host.current()
    assert host.cpuinfo
    assert accel.choose_accelerator("auto", host.machine, host).name in ("kvm", "tcg")
