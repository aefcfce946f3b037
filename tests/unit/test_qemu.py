"""Test QEMU's command line, rendered for both architectures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from caisson.image.vm import qemu
from caisson.image.vm.errors import VMError

MANIFEST: dict[str, Any] = {
    "arch": "amd64",
    "cmdline": "quiet panic=-1",
    "kernel": {"file": "vmlinux"},
    "root": {"file": "initrd.img", "format": "initrd"},
}


def render(
    arch: str = "amd64",
    accelerator: str = "tcg",
    vsock: str = "user",
    cpus: int = 1,
    version: tuple[int, int] = (10, 0),
    more: dict[str, Any] = {},  # noqa: B006 - read only
    **wanted: Any,
) -> Sequence[str]:
    devices = qemu.Devices(Path("/vm/console,1.log"), Path("/vm/qmp.sock"), vsock, vsock_fd=9, cid=77)
    return qemu.command(
        qemu.QemuProgram("qemu", version), Path("/image"), MANIFEST | {"arch": arch} | more, devices,
        qemu.MachineSpec("v", accelerator, memory=256, cpus=cpus, **wanted),
    )  # fmt: skip


def after(words: Sequence[str], option: str) -> list[str]:
    return [words[index + 1] for index, word in enumerate(words) if word == option]


def test_emulation_with_our_own_device() -> None:
    words = render(cpus=2)
    assert after(words, "-kernel") == ["/image/vmlinux"]
    assert after(words, "-initrd") == ["/image/initrd.img"]
    assert after(words, "-accel") == ["tcg"]
    assert after(words, "-cpu") == ["max,-erms,-fsrm"]
    assert after(words, "-smp") == ["2"]
    assert after(words, "-machine") == ["q35,memory-backend=ram"]
    # vhost-user works only with shared memory, and fails silently otherwise.
    assert after(words, "-object") == ["memory-backend-memfd,id=ram,size=256M,share=on"]
    assert "socket,id=vsock,fd=9" in after(words, "-chardev")
    assert "vhost-user-vsock-pci,chardev=vsock" in after(words, "-device")
    assert "pcie-root-port,id=port0,chassis=1,addr=10" in after(words, "-device")
    assert after(words, "-append") == ["console=ttyS0 quiet panic=-1 no_timer_check noreplace-smp init_on_alloc=1"]
    assert "file,id=console,path=/vm/console,,1.log" in after(words, "-chardev")
    assert "-netdev" not in words
    assert "-nic" not in words


def test_the_users_words_come_last() -> None:
    devices = qemu.Devices(Path("/c"), Path("/q"), "user", vsock_fd=9, cid=77)
    words = qemu.command(
        qemu.QemuProgram("qemu", (10, 0)), Path("/image"), MANIFEST, devices,
        qemu.MachineSpec("v", "kvm", memory=256, cpus=1, append="agent.log=debug loglevel=7"),
    )  # fmt: skip
    assert after(words, "-append") == ["console=ttyS0 quiet panic=-1 agent.log=debug loglevel=7"]


def test_kvm_with_the_kernels_device() -> None:
    words = render(accelerator="kvm", vsock="vhost")
    assert after(words, "-cpu") == ["host"]
    assert "vhost-vsock-pci,guest-cid=77,vhostfd=9" in after(words, "-device")
    assert after(words, "-object") == ["memory-backend-memfd,id=ram,size=256M,share=on"]  # virtiofsd maps it
    assert after(words, "-append") == ["console=ttyS0 quiet panic=-1"]


def test_aarch64() -> None:
    words = render(arch="arm64")
    assert after(words, "-cpu") == ["max,pauth-impdef=on"]
    assert after(words, "-machine")[0].startswith("virt,")
    assert after(words, "-append") == ["console=ttyAMA0 quiet panic=-1 init_on_alloc=1"]


def test_no_parameter_for_emulation_reaches_kvm() -> None:
    for arch in qemu.ARCHITECTURES:
        for parameter in (*qemu.TCG_PARAMETERS, qemu.CLEARED_PAGES, qemu.UNCLEARED_PAGES):
            assert parameter not in after(render(arch=arch, accelerator="kvm"), "-append")[0].split()


@pytest.mark.parametrize("version, parameter", [((7, 2), "init_on_alloc=0"), ((8, 0), "init_on_alloc=1")])
def test_pages_are_cleared_where_their_old_code_would_run(version: tuple[int, int], parameter: str) -> None:
    assert parameter in after(render(version=version), "-append")[0].split()


@pytest.mark.parametrize("arch", list(qemu.ARCHITECTURES))
@pytest.mark.parametrize("accelerator", ["kvm", "tcg"])
@pytest.mark.parametrize("vsock", ["user", "vhost"])
def test_all_have_what_every_vm_has(arch: str, accelerator: str, vsock: str) -> None:
    words = render(arch, accelerator, vsock)
    assert {"-nodefaults", "-no-user-config", "-no-reboot"} <= set(words)
    assert after(words, "-display") == ["none"]
    assert after(words, "-qmp") == ["unix:/vm/qmp.sock,server=on,wait=off"]
    assert after(words, "-serial") == ["chardev:console"]
    assert "virtio-rng-pci" in after(words, "-device")
    assert after(words, "-m") == ["256M"]


@pytest.mark.parametrize(
    ("accelerator", "cpus", "version", "option"),
    [
        ("tcg", 2, (7, 2), "tcg,thread=single"),
        ("tcg", 2, (8, 0), "tcg,thread=single"),
        ("tcg", 2, (8, 1), "tcg"),
        ("tcg", 2, (10, 0), "tcg"),
        ("tcg", 1, (7, 2), "tcg"),
        ("kvm", 2, (7, 2), "kvm"),
    ],
)
def test_old_emulation_runs_no_cpus_in_parallel(
    accelerator: str, cpus: int, version: tuple[int, int], option: str
) -> None:
    assert after(render(accelerator=accelerator, cpus=cpus, version=version), "-accel") == [option]


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(VMError, match="riscv64"):
        render(arch="riscv64")


def test_a_missing_program_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(VMError, match="apt-get install qemu-system-x86"):
        qemu.probe(qemu.ARCHITECTURES["amd64"])


@pytest.mark.parametrize(
    ("answer", "version"), [("7.2.22 (Debian)", (7, 2)), ("10.0.1", (10, 0)), ("6.2.0", None), ("unknown", None)]
)
def test_old_versions_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, answer: str, version: tuple[int, int] | None
) -> None:
    program = tmp_path / "qemu-system-x86_64"
    program.write_text(f"#!/bin/sh\necho 'QEMU emulator version {answer}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/bin:/usr/bin")
    if version:
        assert qemu.probe(qemu.ARCHITECTURES["amd64"]) == qemu.QemuProgram(str(program), version, answer)
    else:
        with pytest.raises(VMError, match=r"7\.2 or newer"):
            qemu.probe(qemu.ARCHITECTURES["amd64"])


def test_room_for_more() -> None:
    words = render(cpus=2, max_cpus=6, max_memory=1024)
    assert after(words, "-smp") == ["2,maxcpus=6"]
    assert after(words, "-m") == ["256M,slots=8,maxmem=1024M"]
    assert after(render(cpus=2, max_cpus=2), "-smp") == ["2"]
    assert after(render(max_memory=256), "-m") == ["256M"]


def test_room_for_cpus_that_the_kernel_would_not_see_is_refused() -> None:
    kernel = {"kernel": {"file": "vmlinux", "release": "6.12.9-cloud"}}
    with pytest.raises(VMError, match=r"--max-cpus: .*Linux 6\.12\.9-cloud counts no CPUs"):
        render(max_cpus=2, more=kernel)
    assert after(render(max_cpus=2, more=kernel, accelerator="kvm"), "-smp") == ["1,maxcpus=2"]
    old = {"kernel": {"file": "vmlinux", "release": "6.1.0-50-cloud"}}
    assert after(render(max_cpus=2, more=old), "-smp") == ["1,maxcpus=2"]


def test_room_for_more_cpus_on_an_old_qemu_keeps_one_thread_for_all() -> None:
    assert after(render(version=(7, 2), max_cpus=2), "-accel") == ["tcg,thread=single"]


def test_shares() -> None:
    words = render(shares={"data": qemu.Share(Path("/a,b")), "out": qemu.Share(Path("/out"), writable=True)})
    local = "security_model=none,multidevs=remap"
    assert after(words, "-fsdev") == [
        f"local,id=data,path=/a,,b,{local},readonly=on",
        f"local,id=out,path=/out,{local},readonly=off",
    ]
    assert {"virtio-9p-pci,fsdev=data,mount_tag=data", "virtio-9p-pci,fsdev=out,mount_tag=out"} < set(
        after(words, "-device")
    )


def test_a_root_on_a_disk() -> None:
    root = {"file": "root.img", "format": "erofs", "cmdline": ["root=/dev/vda", "ro"]}
    words = render(more={"root": root})
    assert after(words, "-initrd") == []
    assert after(words, "-drive") == ["if=none,id=root,format=raw,readonly=on,file=/image/root.img"]
    assert "virtio-blk-pci,drive=root" in after(words, "-device")
    assert after(words, "-append")[0].startswith("console=ttyS0 quiet panic=-1 root=/dev/vda ro ")
