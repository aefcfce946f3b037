"""Snapshots: a guest whose agent listens, saved once, and restored in any number of clones.

<cache>/snapshots/<name>/snapshot.json   what it is compatible with: image, QEMU, accelerator, CPU, vsock device, size
                         ram             the guest's memory, with holes; nobody ever writes to it again
                         state           everything else, as QEMU saves it

It appears by rename, so it is complete.  A clone gets a copy of the memory, or with the kernel's vsock device,
to which memory need not be shared, a private mapping of the file.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import time
from pathlib import Path

from caisson.image.build.cache import Cache, default_root
from caisson.image.vm import qemu
from caisson.image.vm.errors import InvalidOption, VMError
from caisson.image.vm.snapshot import ram as memory
from caisson.proto.contract import READY_LINE
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, Self

STEP = "snapshots"

#: Their directory under the old name.
FORMER_STEP = "templates"

#: Bytes of a console to search for the ready line.
MAX_BOOT_LOG = 4 << 20

#: The version of snapshot.json.
FORMAT = 4


class SnapshotCompatibility(Record):
    """The properties that must match to restore a saved guest.

    ``image`` is the digest of its image.json; ``cpu`` is QEMU's model and, where that is the host's own, its name.
    """

    image: str
    qemu: str
    machine: str
    accel: str
    cpu: str
    vsock: str

    @classmethod
    def current(cls, image: Path, accel: str, vsock: str, qemu_title: str) -> Self:
        """Return the properties of a guest with this image and QEMU on this machine.  Raises VMError."""
        text, manifest = qemu.read_manifest(image)
        architecture = qemu.architecture_of(manifest)
        cpu = architecture.cpu(accel) + (f", {_host_cpu()}" if accel == "kvm" else "")
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cls(digest, qemu_title, architecture.machine, accel, cpu, vsock)


#: Names of the fields in errors.
TITLES = {
    "image": "the image",
    "qemu": "QEMU",
    "machine": "the machine type",
    "accel": "the accelerator",
    "cpu": "the CPU",
    "vsock": "the vsock device",
}


class Snapshot(Record):
    """A saved guest: ``directory`` holds its files; ``memory`` in MiB, ``cpus`` and ``append`` as in VMConfig."""

    name: str
    directory: Path
    image: Path
    compatibility: SnapshotCompatibility
    memory: int
    cpus: int
    append: str
    created: float = 0.0

    @classmethod
    def named(cls, name: str) -> Self:
        """Return the snapshot of this name.  Raises VMError if there is none."""
        found = cls.load(name)
        if found is None:
            raise VMError(f"snapshot {name!r}: does not exist; save it: caisson save-snapshot {name}")
        return found

    @classmethod
    def load(cls, name: str, root: Path | None = None) -> Self | None:
        """Return the snapshot of this name; None if there is none.  Raises VMError if it cannot be used."""
        cache = _cache(root)
        directory = cache.get(STEP, check_name(name))
        if directory is None:
            if (cache.root / FORMER_STEP / name).is_dir():
                raise VMError(f"snapshot {name!r}: was saved by an older Caisson; {_way_out(name)}")
            return None
        try:
            document = json.loads((directory / "snapshot.json").read_text())
            if (version := document.pop("format")) != FORMAT:
                age = "an older" if isinstance(version, int) and version < FORMAT else "a newer"
                raise VMError(f"snapshot {name!r}: was saved by {age} Caisson; {_way_out(name)}")
            compatibility = SnapshotCompatibility(**document["compatibility"])
            document |= {"image": Path(document["image"]), "compatibility": compatibility}
            return cls(name=name, directory=directory, **document)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise VMError(f"snapshot {name!r} cannot be read: {error}; {_way_out(name)}") from error

    def document(self) -> dict[str, Any]:
        """Return it as JSON has it."""
        paths = {"directory": str(self.directory), "image": str(self.image)}
        return vars(self) | paths | {"compatibility": vars(self.compatibility)}

    def check(self, here: SnapshotCompatibility) -> None:
        """Check that it can be restored in this environment.  Raises VMError."""
        for field, title in TITLES.items():
            saved, found = getattr(self.compatibility, field), getattr(here, field)
            if saved != found:
                raise misfit(self.name, title, saved, found)


def misfit(name: str, title: str, saved: str, found: str) -> VMError:
    """Return the error for a snapshot that cannot be restored here, as something has changed."""
    return VMError(f"snapshot {name!r} does not fit: {title} was {saved}, and is {found}; {_way_out(name)}")


def check_name(name: str) -> str:
    """Return a valid snapshot name.  Raises VMError for an invalid one."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise InvalidOption(f"snapshot {name!r}: is not a name; give up to 100 letters, digits, '_', '.' and '-'")
    return name


def snapshot_directory(name: str) -> Path:
    """Return the directory of a snapshot.  Raises VMError for an invalid name."""
    return _cache(None).root / STEP / check_name(name)


def has_printed_ready(agent_socket: Path) -> bool:
    """Return whether the console shows that the agent listens: the `ready` of a guest to be saved.

    It has no vsock device yet through which to probe the agent.
    """
    try:
        with agent_socket.with_name("console.log").open("rb") as console:
            return READY_LINE.encode() in console.read(MAX_BOOT_LOG)
    except FileNotFoundError:
        return False


def store(snapshot: Snapshot, ram: int, state: bytes) -> int:
    """Store a snapshot atomically, replacing an older one; returns its bytes on disk.

    ``ram`` is a file with the stopped guest's memory.  Raises VMError.
    """
    name, cache = snapshot.name, _cache(snapshot.directory.parents[1])
    document = snapshot.document() | {"format": FORMAT, "created": time.time()}
    del document["name"], document["directory"]
    try:
        with cache.scratch(STEP) as scratch:
            made = scratch / "snapshot"
            made.mkdir(mode=0o700)
            # The guest's memory is private.
            with open(os.open(made / "ram", os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600), "r+b", buffering=0) as file:  # noqa: PTH123
                memory.pack(ram, file.fileno())
            (made / "state").write_bytes(state)
            (made / "snapshot.json").write_text(json.dumps(document, indent=2) + "\n")
            size = sum(path.stat().st_blocks * 512 for path in made.iterdir())
            (made / ".used").write_text(str(size))
            for path in made.iterdir():
                path.chmod(0o600)
            # A directory cannot be renamed onto a non-empty one.
            with contextlib.suppress(FileNotFoundError):
                snapshot.directory.rename(scratch / "old")
            made.rename(snapshot.directory)
    except OSError as error:
        raise VMError(f"snapshot {name!r} could not be stored: {error.strerror or error}") from error
    return size


def _way_out(name: str) -> str:
    return f"save it again: caisson save-snapshot {name}"


def _cache(root: Path | None) -> Cache:
    return Cache(root or default_root())


def _host_cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else os.uname().machine
