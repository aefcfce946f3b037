"""What booting a VM would run, for whoever wants to look at it or to run it by hand."""

from __future__ import annotations

import random
import shlex
from dataclasses import dataclass
from pathlib import Path

from caisson.image.vm import qemu, vsock
from caisson.image.vm.config import VMConfig
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import VMError
from caisson.image.vm.vsock import vhost


@dataclass(frozen=True)
class DryRun:
    """``command`` is QEMU's; what has to run beside it, a line for a shell, is ``beside``; ``reasons`` say why so."""

    command: tuple[str, ...]
    beside: str
    reasons: str


def dry_run(config: VMConfig) -> DryRun:
    """What `VM.start` would run.

    A VM gives its QEMU open sockets; in this command they have names instead, so that QEMU opens them itself.  Raises
    VMError where there would be none, and for a clone: much of that is said to QEMU when it runs.
    """
    if config.template:
        raise VMError("--dry-run: a clone of a template is more than a command: its memory and state are put into it")
    image = Path(config.image).resolve()
    _, manifest = qemu.read_manifest(image)
    accelerator, transport = config.choices()
    directory = VMDirectory.of(config.name)
    user = transport.name == "user"
    cid = vsock.USER_CID if user else random.randint(vhost.FIRST_CID, vhost.LAST_CID)
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
    wanted = qemu.Wanted.of(config.name, accelerator.name, config.document(accelerator, transport))
    command = qemu.command(qemu.probe(qemu.architecture_of(manifest)), image, manifest, devices, wanted)
    backend = vsock.backend(transport.name, directory, cid, ["--listen", str(socket)] if user else [])
    beside = f"mkdir -p {shlex.quote(str(directory.path))} && {shlex.join(backend)}"
    return DryRun(tuple(command), beside, f"{accelerator.reason}; {transport.reason}")
