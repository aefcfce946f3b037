"""QEMU's command line: a pure function of the program, the image, the devices and the machine."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from caisson.image.programs import package_of, which
from caisson.image.vm import network
from caisson.image.vm.errors import VMError
from caisson.image.vm.network import Publish
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

#: Older versions do not tell vhost-user devices to enable their rings, and lack options used here.
MIN_VERSION = (7, 2)
UNKNOWN = (0, 0)

#: Older versions may run stale code when one virtual CPU rewrites what another is about to execute: kernels patch
#: static keys, and one boot in a hundred panics with "int3".  With one thread for all CPUs that cannot happen.  (Fixed
#: by QEMU's commit deba78709a; seen here, and described in https://github.com/multipath-tcp/mptcp_net-next/issues/471.)
MTTCG_VERSION = (8, 1)

#: Kernel parameters for emulation.  Timers fire late there, so that checks of them fail or take long; patching every
#: LOCK prefix out of a kernel on one CPU costs more than it saves.  Together they save some 0.3 s of a boot;
#: `tsc=reliable`, a given TSC frequency and `nolapic_timer` made no measurable difference (6.12, QEMU 7.2).
TCG_PARAMETERS = ("no_timer_check", "noreplace-smp")

#: Do not clear each page that the kernel allocates: vsock from the guest is faster, 180 MB/s instead of 128, and to it,
#: 166 instead of 137.  Clearing is a second line of defence inside the guest, and emulation itself is none (QEMU,
#: docs/system/security.rst).
UNCLEARED_PAGES = "init_on_alloc=0"

#: From this version on QEMU looks up translated code by its physical address alone (CF_PCREL), and does not notice what
#: another process writes to the guest's memory: most programs read through virtiofs ran the code that had been in their
#: pages before.  When the guest clears a page, it writes to it itself, and QEMU discards what it has translated of it.
CODE_BY_PAGE = (8, 0)
CLEARED_PAGES = "init_on_alloc=1"

#: With "enhanced rep movsb" Linux copies by bytes, and emulation one byte at a time.  Without it the guest copies eight
#: at a time: its file reads and writes took 0.2 to 0.5 times as long, and vsock was 1.5 (to it) and 2 times as fast.
#: To Linux 6.1, "fast short rep mov" (QEMU 8) implies it, and its memmove is wrong with that flag alone.
TCG_CPU = "max,-erms,-fsrm"

#: Pointer authentication by QEMU's own hash, not by the architecture's cipher, which takes half of all time under
#: emulation.  Source: QEMU, docs/system/arm/cpu-features.rst.
ARM_TCG_CPU = "max,pauth-impdef=on"


class Architecture(Record):
    """The machine of a CPU architecture; ``uname`` is the kernel's name for the architecture."""

    uname: str
    program: str
    machine: str
    console: str
    tcg_cpu: str = "max"
    tcg_parameters: tuple[str, ...] = ()

    def cpu(self, accelerator: str) -> str:
        """Return the model of the virtual CPUs."""
        return self.tcg_cpu if accelerator == "tcg" else "host"


ARCHITECTURES = {
    "amd64": Architecture("x86_64", "qemu-system-x86_64", "q35", "ttyS0", TCG_CPU, TCG_PARAMETERS),
    "arm64": Architecture("aarch64", "qemu-system-aarch64", "virt,gic-version=max", "ttyAMA0", ARM_TCG_CPU),
}

#: Slots of the root bus, in hexadecimal, with ports into which disks, shares and interfaces can be plugged.
PORTS = ("10", "11", "12", "13", "14", "15", "16", "17")

#: Since this version Linux assumes that a CPU that is not enabled in ACPI's tables never will be, unless it detects a
#: hypervisor (acpi_is_processor_usable() in arch/x86/kernel/acpi/boot.c).
NEEDS_A_HYPERVISOR = (6, 3)

#: The slot of the port into which a clone's vsock device is plugged.
VSOCK_PORT = "18"

#: How many times memory can be added.
MEMORY_SLOTS = 8


class QemuProgram(Record):
    """A QEMU program; ``title`` is the version that it prints, with the distribution's."""

    path: str
    version: tuple[int, int]
    title: str = ""


class Devices(Record):
    """The devices prepared for QEMU: ``vsock_fd`` is the vhost-user socket, or an open /dev/vhost-vsock; a QEMU that is
    to open the socket itself gets ``vsock_path`` instead.

    ``ram`` is the file for the memory of a guest that is to be saved, or is made from a snapshot (``clone``).  A guest
    to be saved has no vhost-user device (``vsock_fd`` < 0), and a clone gets it later (vsock_plug).  The firmware's
    messages go to the file ``firmware``, if it prints any (SeaBIOS: on I/O port 0x402).
    """

    console: Path
    qmp: Path
    vsock: str
    vsock_fd: int
    cid: int
    ram: Path | None = None
    clone: bool = False
    firmware: Path | None = None
    vsock_path: Path | None = None

    @property
    def vsock_chardev(self) -> str:
        """Return the chardev of the vhost-user device."""
        where = f"path={_escape(self.vsock_path)}" if self.vsock_path else f"fd={self.vsock_fd}"
        return f"socket,id=vsock,{where}"

    @property
    def vhost_vsock(self) -> str:
        """Return the kernel's device."""
        opened = f",vhostfd={self.vsock_fd}" if self.vsock_fd >= 0 else ""
        return f"vhost-vsock-pci,guest-cid={self.cid}{opened}"


class MachineSpec(Record):
    """The machine for QEMU to emulate.

    ``memory`` is in MiB; ``max_memory`` and ``max_cpus`` are the maximums with hot-plug, 0 for no more than at the
    start.  ``shares`` are directories of the host by the tag that the guest mounts (9p).
    """

    name: str
    accelerator: str
    memory: int
    cpus: int
    max_memory: int = 0
    max_cpus: int = 0
    append: str = ""
    shares: Mapping[str, Share] = NOTHING
    network: str = "none"
    publish: Sequence[Publish] = ()

    @classmethod
    def of(cls, name: str, accelerator: str, document: Mapping[str, Any]) -> Self:
        """Make one from VMConfig.document."""
        shares = {tag: Share(Path(path), writable) for tag, (path, writable) in document["shares"].items()}
        publish = [Publish(**rule) for rule in document["publish"]]
        same = ("memory", "cpus", "max_memory", "max_cpus", "append", "network")
        return cls(name, accelerator, shares=shares, publish=publish, **{key: document[key] for key in same})


class Share(Record):
    """A directory of the host."""

    path: Path
    writable: bool = False


def read_manifest(image: Path) -> tuple[str, dict[str, Any]]:
    """Read an image's image.json; returns its text and the document.  Raises VMError where there is no image."""
    try:
        text = (image / "image.json").read_text()
        manifest = dict(json.loads(text))
        architecture_of(manifest)
        for part in (manifest["kernel"]["file"], manifest["root"]["file"]):
            if "/" in part:  # QEMU reads it as whoever starts it, and the guest gets it
                raise ValueError(f"{part!r} is not a file in its directory")
            if not (image / part).is_file():
                raise VMError(f"{image}: its image lacks {part}; build it again: caisson build-image")
        str(manifest["cmdline"])
    except OSError as error:
        why = (error.strerror or "").lower()
        raise VMError(f"{image}: contains no image ({why}); build one: caisson build-image") from error
    except (ValueError, TypeError, KeyError) as error:
        why = f"{error.args[0]} is missing" if isinstance(error, KeyError) else str(error)
        raise VMError(f"{image / 'image.json'} does not describe an image: {why}") from error
    return text, manifest


def architecture_of(manifest: Mapping[str, Any]) -> Architecture:
    """Return the machine for an image.  Raises VMError for an architecture that is not known."""
    name = str(manifest.get("arch"))
    if name not in ARCHITECTURES:
        raise VMError(f"{name}: the image is for it, but VMs are available only for {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def probe(architecture: Architecture) -> QemuProgram:
    """Find a QEMU that is new enough, and run it for its version.  Raises VMError that says what to install."""
    path = _path(architecture)
    answer = _version(path, Path(path).stat().st_mtime_ns)
    program = _of_version(path, answer.partition("version ")[2].partition("\n")[0].strip())
    least = ".".join(map(str, MIN_VERSION))
    if program.version == UNKNOWN:
        raise VMError(f"{path}: prints no version; install QEMU {least} or newer")
    if program.version < MIN_VERSION:
        raise VMError(f"{path}: is version {program.title}; install QEMU {least} or newer")
    return program


def expected(architecture: Architecture, title: str) -> QemuProgram:
    """Find the QEMU that had this version when it saved a snapshot; its monitor tells whether it still has.

    To ask the program itself would be a fifth of the time until a clone's QEMU starts.  Raises VMError.
    """
    return _of_version(_path(architecture), title)


def _path(architecture: Architecture) -> str:
    program = which(architecture.program)
    if program is None:
        package = package_of(architecture.program)
        raise VMError(f"{architecture.program}: is not installed; run: sudo apt-get install {package}")
    return program


def _of_version(program: str, title: str) -> QemuProgram:
    found = re.match(r"(\d+)\.(\d+)", title)
    return QemuProgram(program, (int(found[1]), int(found[2])) if found else UNKNOWN, title)


@lru_cache(maxsize=8)
def _version(program: str, changed: int) -> str:
    """Return the output of --version; run again only if the program's file has changed."""
    return subprocess.run([program, "--version"], capture_output=True, text=True).stdout


def parameters(
    manifest: Mapping[str, Any], architecture: Architecture, accelerator: str, version: tuple[int, int], append: str
) -> str:
    """Return the kernel's command line: words for image, root, machine and accelerator, then the user's, which win."""
    words = [f"console={architecture.console}", str(manifest["cmdline"])]
    words += manifest["root"].get("cmdline", [])
    if accelerator == "tcg":
        words += architecture.tcg_parameters
        words.append(UNCLEARED_PAGES if version < CODE_BY_PAGE else CLEARED_PAGES)
    return " ".join([*words, append]).rstrip()


def acceleration(accelerator: str, cpus: int, version: tuple[int, int]) -> str:
    """Return the value of -accel."""
    if accelerator == "tcg" and cpus > 1 and version < MTTCG_VERSION:
        return "tcg,thread=single"
    return accelerator


def processors(wanted: MachineSpec, manifest: Mapping[str, Any]) -> str:
    """Return the value of -smp.  Raises VMError for a maximum that the guest's kernel would ignore."""
    if wanted.max_cpus <= wanted.cpus:
        return str(wanted.cpus)
    release = str(manifest["kernel"].get("release", ""))
    found = re.match(r"(\d+)\.(\d+)", release)
    if wanted.accelerator == "tcg" and found and (int(found[1]), int(found[2])) >= NEEDS_A_HYPERVISOR:
        raise VMError(
            f"--max-cpus: without a hypervisor that it knows, as under emulation, Linux {release} counts no CPUs that "
            "are not there at the start; use KVM, an image of --suite bookworm (Linux 6.1), or boot with all: --cpus"
        )
    return f"{wanted.cpus},maxcpus={wanted.max_cpus}"


def memory(wanted: MachineSpec) -> str:
    """Return the value of -m.  With a higher maximum a guest reserves 64 MiB for DMA, so there is none by default."""
    more = wanted.max_memory > wanted.memory
    return f"{wanted.memory}M" + (f",slots={MEMORY_SLOTS},maxmem={wanted.max_memory}M" if more else "")


def root(image: Path, manifest: Mapping[str, Any]) -> list[str]:
    """Return the options for an image's root: an initrd, or a read-only disk."""
    file = image / manifest["root"]["file"]
    if manifest["root"]["format"] == "initrd":
        return ["-initrd", str(file)]
    return [
        "-drive", f"if=none,id=root,format=raw,readonly=on,file={_escape(file)}",
        "-device", "virtio-blk-pci,drive=root",
    ]  # fmt: skip


def command(
    program: QemuProgram, image: Path, manifest: Mapping[str, Any], devices: Devices, wanted: MachineSpec
) -> Sequence[str]:
    """Return the command that boots an image."""
    architecture = architecture_of(manifest)
    machine = f"{architecture.machine},memory-backend=ram"
    words = [
        program.path,
        "-name", f"caisson-{wanted.name}",
        "-nodefaults", "-no-user-config", "-no-reboot",
        "-display", "none",
        "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", machine,
        "-accel", acceleration(wanted.accelerator, max(wanted.cpus, wanted.max_cpus), program.version),
        "-cpu", architecture.cpu(wanted.accelerator),
        "-smp", processors(wanted, manifest),
        "-m", memory(wanted),
        "-kernel", str(image / manifest["kernel"]["file"]),
        *root(image, manifest),
        "-append", parameters(manifest, architecture, wanted.accelerator, program.version, wanted.append),
        "-chardev", f"file,id=console,path={_escape(devices.console)}",
        "-serial", "chardev:console",
        "-qmp", f"unix:{_escape(devices.qmp)},server=on,wait=off",
        "-device", "virtio-rng-pci",
        "-device", "virtio-balloon-pci,free-page-reporting=on,deflate-on-oom=on",
    ]  # fmt: skip
    for number, slot in enumerate(PORTS):
        words += ["-device", f"pcie-root-port,id=port{number},chassis={number + 1},addr={slot}"]
    if devices.firmware and architecture.uname == "x86_64":
        words += [
            "-chardev", f"file,id=firmware,path={_escape(devices.firmware)}",
            "-device", "isa-debugcon,iobase=0x402,chardev=firmware",
        ]  # fmt: skip
    if wanted.network == "user":
        words += network.options(wanted.publish)
    for tag, share in wanted.shares.items():
        mode = "off" if share.writable else "on"
        words += [
            "-fsdev", f"local,id={tag},path={_escape(share.path)},security_model=none,multidevs=remap,readonly={mode}",
            "-device", f"virtio-9p-pci,fsdev={tag},mount_tag={tag}",
        ]  # fmt: skip
    if devices.ram:
        return [*words, *_snapshot(architecture, devices, wanted)]
    # Our own vsock device reads and writes the guest's memory, as virtiofsd does: a memfd that they map, too.
    words += ["-object", f"memory-backend-memfd,id=ram,size={wanted.memory}M,share=on"]
    if devices.vsock == "user":
        words += ["-chardev", devices.vsock_chardev, "-device", "vhost-user-vsock-pci,chardev=vsock"]
    else:
        words += ["-device", devices.vhost_vsock]
    return words


def _snapshot(architecture: Architecture, devices: Devices, wanted: MachineSpec) -> list[str]:
    """Return the options of a guest that is to be saved or is made from a snapshot: memory in a file, and a vmgenid, by
    which its kernel notices that it is a copy.

    QEMU cannot save a vhost-user device, so a guest is saved without one, and clones have it plugged in.  The kernel's
    device can be saved, and restored with another CID; it needs no shared memory, so a clone maps the snapshot's file.
    """
    assert devices.ram is not None
    vhost_user = devices.vsock == "user"
    share = "off" if devices.clone and not vhost_user else "on"
    words = [
        "-object",
        f"memory-backend-file,id=ram,size={wanted.memory}M,mem-path={_escape(devices.ram)},share={share}",
    ]
    if architecture.uname == "x86_64":
        words += ["-device", "vmgenid,guid=auto"]
    words += ["-device", f"pcie-root-port,id=vsockport,chassis={len(PORTS) + 1},addr={VSOCK_PORT}"]
    if not vhost_user:
        words += ["-device", devices.vhost_vsock]
    elif devices.clone:
        words += ["-chardev", devices.vsock_chardev]
    return [*words, "-incoming", "defer"] if devices.clone else words


def vsock_plug(kind: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the monitor's commands that add a clone's vsock device; none where it is restored with the rest."""
    if kind != "user":
        return []
    return [("device_add", {"driver": "vhost-user-vsock-pci", "id": "vsock", "chardev": "vsock", "bus": "vsockport"})]


def _escape(path: Path) -> str:
    """Escape a path for a comma-separated option."""
    return str(path).replace(",", ",,")
