"""The configuration of a VM from its starter, and the commands that boot it."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping
from pathlib import Path

from caisson.image.vm import qemu
from caisson.image.vm.accel import Choice, Host, choose_accelerator, choose_vsock
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import InvalidOption
from caisson.image.vm.hotplug import virtiofs
from caisson.image.vm.network import KINDS, Publish
from caisson.image.vm.snapshot.snapshot import Snapshot
from caisson.image.vm.vsock import backend as vsock
from caisson.proto.record import NOTHING, Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

#: Minimum MiB of a guest.
MIN_MEMORY = 128

#: Valid share tags, for QEMU and the guest's kernel.
TAG = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,30}")


def memory_of_host() -> int:
    """Return this machine's memory in MiB."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") >> 20


def parse_share(text: str) -> tuple[str, tuple[str, bool]]:
    """Parse TAG=DIR, TAG=DIR:ro or TAG=DIR:rw, as VMConfig has it.  Raises VMError.

    If only a directory whose name ends in :ro or :rw exists, that one is meant; a second ending disambiguates.
    """
    tag, equals, path = text.partition("=")
    if not equals or not path:
        raise InvalidOption(f"--share {text}: is not TAG=DIR, TAG=DIR:ro or TAG=DIR:rw")
    directory, colon, mode = path.rpartition(":")
    if not colon or mode not in ("ro", "rw") or (Path(path).is_dir() and not Path(directory).is_dir()):
        return tag, (path, False)
    return tag, (directory, mode == "rw")


class VMConfig(Record):
    """What to boot and how: ``image`` is an image's directory, ``memory`` in MiB, ``append`` for the kernel.

    ``max_memory`` and ``max_cpus`` are the hot-plug maximums (0: no hot-plug).  ``shares`` are directories of the host,
    by tag, with whether the guest may write to them; ``virtiofs`` are others, which are plugged in: a clone can have
    them, too.  With a ``snapshot`` the VM is a clone of it; a ``savable`` VM can be saved as a snapshot, and has no
    vsock device (vm/snapshot/snapshot.py).  With ``firmware`` the firmware's messages are written to a file in the VM's
    directory (x86).  ``network`` is ``none`` or ``user``; ``publish`` are ports of this machine that are forwarded to
    it (network.py).  ``on_resume`` is a command that is run, with the agent's socket as its last word, after the host
    was suspended: the guest's clock is behind then.  With ``writable_disks`` the guest may write to plugged files of
    any size.  ``root_share`` is the tag of a share with containers' root file systems: the VM ends with its virtiofsd.
    """

    image: Path
    name: str = "default"
    accel: str = "auto"
    vsock: str = "auto"
    memory: int = 512
    cpus: int = 1
    append: str = ""
    max_memory: int = 0
    max_cpus: int = 0
    shares: Mapping[str, tuple[str, bool]] = NOTHING
    virtiofs: Mapping[str, tuple[str, bool]] = NOTHING
    snapshot: Snapshot | None = None
    savable: bool = False
    firmware: bool = False
    network: str = "none"
    publish: tuple[Publish, ...] = ()
    on_resume: tuple[str, ...] = ()
    writable_disks: bool = False
    root_share: str = ""

    def __post_init__(self) -> None:
        if self.memory < MIN_MEMORY:
            raise InvalidOption(f"--memory {self.memory}: too little for a guest; give MiB, {MIN_MEMORY} or more")
        most = max(memory_of_host(), MIN_MEMORY)
        for option, value in (("--memory", self.memory), ("--max-memory", self.max_memory)):
            if value > most:
                raise InvalidOption(f"{option} {value}: more than the {most} MiB of this machine; give fewer")
        if not 1 <= self.cpus <= 255:
            raise InvalidOption(f"--cpus {self.cpus}: is out of range; give 1 to 255")
        if self.max_cpus and not self.cpus <= self.max_cpus <= 255:
            raise InvalidOption(f"--max-cpus {self.max_cpus}: is out of range; give {self.cpus} (--cpus) to 255")
        if self.max_memory and self.max_memory < self.memory:
            raise InvalidOption(
                f"--max-memory {self.max_memory}: is too little; give at least {self.memory} MiB (--memory)"
            )
        for tag, (path, _) in self.shares.items():
            if not TAG.fullmatch(tag):
                raise InvalidOption(f"share {tag!r}: is not a tag; give up to 31 letters, digits, - and _")
            if not Path(path).is_dir():
                raise InvalidOption(f"{path}: is not a directory; --share takes TAG=DIR, TAG=DIR:ro or TAG=DIR:rw")
        if self.network not in KINDS:
            raise InvalidOption(f"--network {self.network}: is not one of {', '.join(KINDS)}")
        if self.publish and self.network == "none":
            raise InvalidOption("--publish: the VM has no network; add --network user")
        if (self.snapshot or self.savable) and self.network != "none":
            raise InvalidOption("--network: a snapshot has no network; boot the VM from an image")
        if (self.snapshot or self.savable) and (self.shares or self.max_memory or self.max_cpus):
            raise InvalidOption(
                "snapshot: cannot have shared directories or room for more memory or CPUs; leave these out"
            )

    @classmethod
    def clone(cls, snapshot: Snapshot, **changes: Any) -> Self:
        """Return the configuration of a clone; ``changes`` may be its name, ``accel`` and ``vsock``."""
        size: dict[str, Any] = {"memory": snapshot.memory, "cpus": snapshot.cpus, "append": snapshot.append}
        return cls(image=snapshot.image, snapshot=snapshot, **size | changes)

    def choices(self) -> tuple[Choice, Choice]:
        """Choose the accelerator and the vsock device on this machine.  Raises VMError."""
        _, manifest = qemu.read_manifest(self.image)
        host = Host.current()
        accelerator = choose_accelerator(self.accel, qemu.architecture_of(manifest).uname, host)
        return accelerator, choose_vsock(self.vsock, host)

    def document(self, accelerator: Choice, transport: Choice) -> dict[str, Any]:
        """Return the JSON document for a supervisor."""
        return vars(self) | {
            "accel": vars(accelerator),
            "vsock": vars(transport),
            "image": str(Path(self.image).resolve()),
            "snapshot": str(self.snapshot.directory) if self.snapshot else None,
            "shares": {tag: [str(Path(path).resolve()), writable] for tag, (path, writable) in self.shares.items()},
            "virtiofs": dict(self.virtiofs),
            "publish": [vars(rule) for rule in self.publish],
        }


def shares_to_plug(config: VMConfig) -> Mapping[str, tuple[str, bool]]:
    """Return the shares to plug in by virtiofs: all of them, if the kernel cannot mount 9p.

    Raises VMError if it cannot mount virtiofs either, or this machine cannot serve it.
    """
    _, manifest = qemu.read_manifest(config.image)
    mountable = manifest["kernel"].get("shares")  # older images without this entry are assumed to have 9p
    if not config.shares or mountable is None or "9p" in mountable:
        return {}
    if "virtiofs" not in mountable:
        raise InvalidOption(
            "--share: this image's kernel can mount neither 9p nor virtiofs; use one that can: --template lean"
        )
    if len(config.shares) > len(qemu.PORTS):
        raise InvalidOption(
            f"--share: with this image's kernel, up to {len(qemu.PORTS)} directories; share one above them"
        )
    for path, writable in config.shares.values():
        virtiofs.command(Path(path), 0, writable=writable)
    return config.shares


class DryRun(Record):
    """The commands of a boot: QEMU's ``command``, a shell line to run ``beside`` it, and the ``reasons`` for both."""

    command: tuple[str, ...]
    beside: str
    reasons: str


def dry_run(config: VMConfig) -> DryRun:
    """Return what `VM.start` would run.

    A VM hands open sockets to its QEMU; in this command they have names instead, so that QEMU opens them itself.
    Raises VMError where no VM could be started, and for a clone: much of that is set up through QEMU's monitor.
    """
    if config.snapshot:
        raise InvalidOption("--dry-run: a clone is more than a command: memory and state of its snapshot are restored")
    image = Path(config.image).resolve()
    _, manifest = qemu.read_manifest(image)
    accelerator, transport = config.choices()
    directory = VMDirectory.of(config.name)
    user = transport.name == "user"
    cid = vsock.USER_CID if user else vsock.random_cid()
    socket = directory.path / "device.sock"
    devices = qemu.Devices(
        console=directory.console,
        qmp=directory.qmp_socket,
        vsock=transport.name,
        vsock_fd=-1,
        cid=cid,
        vsock_path=socket if user else None,
        firmware=directory.firmware if config.firmware else None,
    )
    wanted = qemu.MachineSpec.of(config.name, accelerator.name, config.document(accelerator, transport))
    command = qemu.command(qemu.probe(qemu.architecture_of(manifest)), image, manifest, devices, wanted)
    backend = vsock.command(transport.name, directory, cid, ["--listen", str(socket)] if user else [])
    beside = f"mkdir -p {shlex.quote(str(directory.path))} && {shlex.join(backend)}"
    return DryRun(tuple(command), beside, f"{accelerator.reason}; {transport.reason}")
