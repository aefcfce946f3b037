"""Templates: a guest whose agent listens, saved once, and served to any number of clones.

<cache>/templates/<name>/template.json   what it is bound to: image, QEMU, accelerator, CPU, vsock device, size
                         ram             the guest's memory, with holes; nobody ever writes to it again
                         state           everything else, as QEMU saves it

It appears by rename, so what is there is whole.  A clone gets a copy of the memory, or with the kernel's vsock device,
to which memory need not be shared, a private mapping of the file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from caisson.image.build.cache import Cache, default_root
from caisson.image.vm import qemu
from caisson.image.vm.errors import VMError
from caisson.proto.contract import READY_LINE

STEP = "templates"

#: What the agent prints when it listens: there is no vsock device yet through which it could be asked.

FORMAT = 2

#: What each bond is called when it does not hold.
BONDS = {
    "image": "the image",
    "qemu": "QEMU",
    "machine": "the machine type",
    "accel": "the accelerator",
    "cpu": "the CPU",
    "vsock": "the vsock device",
}


@dataclass(frozen=True)
class Bond:
    """What a saved guest cannot do without; ``image`` is the digest of its description, ``cpu`` is QEMU's model and,
    where that is the host's own, the name of that.
    """

    image: str
    qemu: str
    machine: str
    accel: str
    cpu: str
    vsock: str

    @classmethod
    def here(cls, image: Path, accel: str, vsock: str) -> Self:
        """What a guest of this image would be bound to.  Raises VMError."""
        text, manifest = qemu.read_manifest(image)
        architecture = qemu.architecture_of(manifest)
        cpu = architecture.cpu(accel) + (f", {_host_cpu()}" if accel == "kvm" else "")
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        return cls(digest, qemu.probe(architecture).title, architecture.machine, accel, cpu, vsock)


@dataclass(frozen=True)
class Template:
    """A saved guest: ``directory`` holds its files; sizes in MiB, as in VMConfig."""

    name: str
    directory: Path
    image: Path
    bond: Bond
    memory: int
    cpus: int
    append: str
    created: float = 0.0

    @classmethod
    def named(cls, name: str) -> Self:
        """The template of this name.  Raises VMError when there is none."""
        found = cls.load(name)
        if found is None:
            raise VMError(f"there is no template {name!r}; save one: invoke save-template --name {name}")
        return found

    @classmethod
    def load(cls, name: str, root: Path | None = None) -> Self | None:
        """The template of this name, if there is one.  Raises VMError for a name that cannot be one's."""
        directory = _cache(root).get(STEP, checked(name))
        if directory is None:
            return None
        try:
            document = json.loads((directory / "template.json").read_text())
            if document.pop("format") != FORMAT:
                raise ValueError("an older Caisson's")
            document |= {"image": Path(document["image"]), "bond": Bond(**document["bond"])}
            return cls(name=name, directory=directory, **document)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise VMError(f"template {name!r} is not readable ({error}); {way_out(name)}") from error

    def check(self, here: Bond) -> None:
        """Raises VMError that names what differs between this template's machine and another."""
        for field, title in BONDS.items():
            saved, found = getattr(self.bond, field), getattr(here, field)
            if saved != found:
                raise VMError(
                    f"template {self.name!r} does not fit: {title} was {saved}, and is {found}; {way_out(self.name)}"
                )


def checked(name: str) -> str:
    """A name that a template can have.  Raises VMError."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", name):
        raise VMError(f"a template's name is made of letters, digits, '_', '.' and '-', and {name!r} is not")
    return name


def way_out(name: str) -> str:
    return f"save it again: invoke save-template --name {name}"


def says_ready(agent_socket: Path) -> bool:
    """Whether the guest has printed that its agent listens: the `ready` of a guest that is to be saved."""
    try:
        return READY_LINE.encode() in agent_socket.with_name("console.log").read_bytes()
    except FileNotFoundError:
        return False


def store(template: Template, ram: int, state: bytes) -> int:
    """Put a template in its place, whole or not at all, instead of an older one; returns its bytes on disk.

    ``ram`` is a file with the stopped guest's memory.  Raises VMError.
    """
    from caisson.image.vm.snapshot import ram as memory

    name, cache = template.name, _cache(template.directory.parents[1])
    document: dict[str, Any] = dataclasses.asdict(template) | {"format": FORMAT, "image": str(template.image)}
    document |= {"created": time.time()}
    del document["name"], document["directory"]
    try:
        with cache.scratch(STEP) as scratch:
            made = scratch / "template"
            made.mkdir(mode=0o755)
            with (made / "ram").open("wb") as file:
                memory.pack(ram, file.fileno())
            (made / "state").write_bytes(state)
            (made / "template.json").write_text(json.dumps(document, indent=2) + "\n")
            size = sum(path.stat().st_blocks * 512 for path in made.iterdir())
            (made / ".used").write_text(str(size))
            # A directory cannot be renamed onto one that is not empty.
            with contextlib.suppress(FileNotFoundError):
                template.directory.rename(scratch / "old")
            made.rename(template.directory)
    except OSError as error:
        raise VMError(f"template {name!r} could not be stored: {error.strerror or error}") from error
    return size


def place(name: str, root: Path | None = None) -> Path:
    """Where the template of this name is, or would be."""
    return _cache(root).root / STEP / checked(name)


def _cache(root: Path | None) -> Cache:
    return Cache(root or default_root())


def _host_cpu() -> str:
    found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else os.uname().machine
