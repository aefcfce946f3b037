"""Detect the accelerator and the vsock device, and explain the choice."""

from __future__ import annotations

import errno
import fcntl
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path

from caisson.image.vm.errors import VMError
from caisson.proto.record import Record

KVM = Path("/dev/kvm")
VHOST_VSOCK = Path("/dev/vhost-vsock")


#: _IO(KVMIO, 0x01)
KVM_CREATE_VM = 0xAE01


class Choice(Record):
    """A choice and its reason.  ``doubt``: evidence that an explicitly requested one cannot work."""

    name: str
    reason: str
    doubt: str = ""


def create_vm(device: int) -> None:
    """Create a VM on an open /dev/kvm, and destroy it.  Raises OSError."""
    if stat.S_ISCHR(os.fstat(device).st_mode):
        os.close(fcntl.ioctl(device, KVM_CREATE_VM, 0))


class Host(Record):
    """The machine to run a VM: uname's architecture, and what its kernel reports."""

    machine: str
    cpuinfo: str
    kvm: Path = KVM
    vhost_vsock: Path = VHOST_VSOCK
    create_vm: Callable[[int], None] = create_vm

    @classmethod
    def current(cls) -> Host:
        """Return this machine."""
        return cls(os.uname().machine, Path("/proc/cpuinfo").read_text())


def _refusal(device: Path, use: Callable[[int], None] = lambda descriptor: None) -> str | None:
    """Return why a device cannot be opened or used, or None."""
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        return f"{device} cannot be opened ({os.strerror(error.errno or 0)})"
    try:
        use(descriptor)
    except OSError as error:
        if error.errno == errno.EBUSY:
            return f"{device} is busy: another hypervisor, such as VirtualBox, uses the processor's virtualization"
        return f"{device} cannot create a VM ({os.strerror(error.errno or 0)})"
    finally:
        os.close(descriptor)
    return None


def _requested(wanted: str, variable: str) -> str:
    """Return the requested choice; with auto, a variable decides: CI must fail rather than silently use less."""
    return (os.environ.get(variable) or wanted) if wanted == "auto" else wanted


def is_open(wanted: str) -> bool:
    """Return whether the accelerator is chosen automatically."""
    return _requested(wanted, "CAISSON_ACCEL") == "auto"


def kvm_doubt(host: Host) -> str | None:
    """Return why KVM, although its device opens, cannot run a stock guest, or None.

    The device may be a back end without hardware virtualization, in which stock guests hang silently or QEMU fails on
    the first missing register.  On x86 the CPU must also show vmx or svm.
    """
    if host.machine == "x86_64" and not re.search(r"^flags\s*:.*\b(vmx|svm)\b", host.cpuinfo, re.MULTILINE):
        return f"{host.kvm} opens, but the CPU shows neither vmx nor svm, so it cannot run a stock guest"
    return None


def choose_accelerator(wanted: str, guest: str, host: Host) -> Choice:
    """Choose: ``auto`` is $CAISSON_ACCEL, else KVM if it can work, else TCG; ``kvm`` and ``tcg`` are what they say.

    ``guest`` is the guest's architecture, by uname's name.  Raises VMError for any other word, and for ``kvm`` if it
    cannot even be tried.
    """
    wanted = _requested(wanted, "CAISSON_ACCEL")
    if wanted not in ("auto", "kvm", "tcg"):
        raise VMError(f"--accel {wanted!r}: is unknown; give auto, kvm or tcg")
    if wanted == "tcg":
        return Choice("tcg", "TCG (emulation), as requested")
    foreign = None
    if guest != host.machine:
        foreign = f"the image is for {guest} and this machine is {host.machine}"
    refusal = foreign or _refusal(host.kvm, host.create_vm)
    doubt = None if refusal else kvm_doubt(host)
    if wanted == "auto":
        if refusal or doubt:
            return Choice("tcg", f"TCG (emulation), not KVM: {refusal or doubt}")
        return Choice("kvm", f"KVM: {host.kvm} opens and the CPU has hardware virtualization")
    if foreign:
        raise VMError(f"--accel kvm: {foreign}; KVM runs only a machine's own architecture: --accel tcg")
    if refusal:
        way_out = "stop its VMs, or choose --accel tcg" if "is busy" in refusal else _kvm_way_out(host.kvm)
        raise VMError(f"--accel kvm: {refusal}; {way_out}")
    # The evidence may be wrong: an explicit request is tried, and a failure is reported.
    return Choice("kvm", "KVM, as requested" + (f", although {doubt}" if doubt else ""), doubt or "")


def _kvm_way_out(device: Path) -> str:
    if device.exists():
        return f"{_access_remedy(device)}, or choose --accel tcg"
    return (
        "load the module: sudo modprobe kvm_intel (or kvm_amd); in a VM, nested virtualization has to be on; "
        f"in a container, {_docker_device(device)}; or choose --accel tcg"
    )


def _access_remedy(device: Path) -> str:
    """Return the command that gives the user access to a device."""
    if os.geteuid() == 0:
        return f"not even root may open it here: {_docker_device(device)}"
    try:
        group, mode = device.group(), device.stat().st_mode
    except KeyError:
        group, mode = "", 0
    if group in ("", "root") or mode & 0o060 != 0o060:
        return f"grant yourself access: sudo setfacl -m u:$USER:rw {device}"
    return f"join the group that owns it: sudo usermod -aG {group} $USER, and log in again"


def _docker_device(device: Path) -> str:
    return f"pass it to the container: docker run --device {device}"


def choose_vsock(wanted: str, host: Host) -> Choice:
    """Choose: ``auto`` is $CAISSON_VSOCK, else the kernel's vhost-vsock if it can be used, else our own device;
    ``vhost`` and ``user`` are what they say.

    Raises VMError for any other word, and for ``vhost`` if it cannot be used.
    """
    wanted = _requested(wanted, "CAISSON_VSOCK")
    if wanted not in ("auto", "vhost", "user"):
        raise VMError(f"--vsock {wanted!r}: is unknown; give auto, vhost or user")
    if wanted == "user":
        return Choice("user", "our own vhost-user device, as requested")
    device = host.vhost_vsock
    refusal = _refusal(device)
    if refusal is None:
        return Choice("vhost", f"the kernel's vhost-vsock: {device} opens")
    if wanted == "auto":
        return Choice("user", f"our own vhost-user device: {refusal}")
    load = f"load the module: sudo modprobe vhost_vsock; in a container, {_docker_device(device)}"
    way_out = _access_remedy(device) if device.exists() else load
    raise VMError(f"--vsock vhost: {refusal}; {way_out}, or choose --vsock user")
