"""Which accelerator and which vsock device: chosen by evidence, with the reason in a sentence."""

from __future__ import annotations

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

from image.vm.errors import VMError

KVM = Path("/dev/kvm")
VHOST_VSOCK = Path("/dev/vhost-vsock")


@dataclass(frozen=True)
class Choice:
    """What was chosen, and why."""

    name: str
    reason: str


def _refusal(device: Path) -> str | None:
    """Why a device cannot be used, or None."""
    try:
        os.close(os.open(device, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        return f"{device} cannot be opened ({os.strerror(error.errno or 0)})"
    return None


def kvm_refusal(cpuinfo: str, machine: str, device: Path = KVM) -> str | None:
    """Why KVM cannot run a stock guest here, or None.

    That the device opens is not enough: behind it may be a backend without hardware virtualization, in which stock
    guests hang without a word.  On x86 the CPU has to show vmx or svm, too.
    """
    if refusal := _refusal(device):
        return refusal
    if machine == "x86_64" and not re.search(r"^flags\s*:.*\b(vmx|svm)\b", cpuinfo, re.MULTILINE):
        return f"{device} opens, but the CPU shows neither vmx nor svm, so stock guests cannot run in it"
    return None


def choose_accelerator(wanted: str, cpuinfo: str | None = None, device: Path = KVM) -> Choice:
    """``auto`` picks KVM where it can work, else TCG; ``kvm`` and ``tcg`` are taken as said.

    Raises VMError for another word, and for ``kvm`` where the device cannot be opened.
    """
    text = Path("/proc/cpuinfo").read_text() if cpuinfo is None else cpuinfo
    if wanted == "tcg":
        return Choice("tcg", "TCG (emulation), as asked for")
    if wanted == "kvm":
        if refusal := _refusal(device):
            raise VMError(f"--accel kvm: {refusal}; {_kvm_way_out(device)}")
        return Choice("kvm", "KVM, as asked for")
    if wanted != "auto":
        raise VMError(f"--accel is auto, kvm or tcg, not {wanted!r}")
    if refusal := kvm_refusal(text, platform.machine(), device):
        return Choice("tcg", f"TCG (emulation), not KVM: {refusal}")
    return Choice("kvm", f"KVM: {device} opens and the CPU has hardware virtualization")


def _kvm_way_out(device: Path) -> str:
    if device.exists():
        return f"join the group that owns it: sudo usermod -aG {device.group()} $USER, and log in again"
    return "load the module: sudo modprobe kvm_intel (or kvm_amd); in a VM, nested virtualization has to be on"


def choose_vsock(wanted: str, device: Path = VHOST_VSOCK) -> Choice:
    """``auto`` picks the kernel's vhost-vsock where it can be used, else our own device; the others are taken as said.

    Raises VMError for another word, and for ``vhost`` where it cannot be used.
    """
    if wanted == "user":
        return Choice("user", "our own vhost-user device, as asked for")
    if wanted not in ("auto", "vhost"):
        raise VMError(f"--vsock is auto, vhost or user, not {wanted!r}")
    refusal = _refusal(device)
    if refusal is None:
        return Choice("vhost", f"the kernel's vhost-vsock: {device} opens")
    if wanted == "vhost":
        way_out = f"sudo chmod 0666 {device}" if device.exists() else "sudo modprobe vhost_vsock"
        raise VMError(f"--vsock vhost: {refusal}; try: {way_out}")
    return Choice("user", f"our own vhost-user device: {refusal}")
