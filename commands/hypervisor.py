"""Kata's remote hypervisor: VMs for the pods of a Kata shim, until SIGTERM."""

from __future__ import annotations

from pathlib import Path

from caisson.agent.hypervisor.server import ServiceError, serve
from caisson.commands.machines import image_directory
from caisson.commands.pods import POD_SNAPSHOT, Pods
from caisson.commands.streams import info
from caisson.image.programs import TO_BOOT, TO_SERVE_PODS, require
from caisson.image.vm import VMError
from caisson.image.vm.snapshot.snapshot import Snapshot


def hypervisor(
    *, socket: str, image: str, snapshot: str, memory: int | None, cpus: int | None, accel: str, vsock: str
) -> None:  # fmt: skip
    """Serve a Kata shim's calls on a Unix socket."""
    path = Path(socket).absolute()
    saved = None if image and not snapshot else _snapshot(snapshot)
    if saved is None:
        directory = image_directory(image, info, also=TO_SERVE_PODS)
    else:
        require((*TO_BOOT, *TO_SERVE_PODS), info)
        directory = Path(image) if image else saved.image
    settings = {
        "image": str(directory), "memory": memory or 0, "cpus": cpus or 0, "accel": accel,
        "snapshot": saved.name if saved else "", "vsock": saved.compatibility.vsock if saved else vsock,
    }  # fmt: skip
    source = f"clones of snapshot {saved.name}, larger VMs" if saved else "VMs"
    try:
        serve(path, Pods(settings), lambda: info(f"{path}: serving; {source} from {directory}"))
    except ServiceError as error:
        raise VMError(str(error)) from error


def _snapshot(name: str) -> Snapshot | None:
    """Return the snapshot to clone: the one of this name, or install-shim's if there is one.  Raises VMError."""
    saved = Snapshot.named(name) if name else Snapshot.load(POD_SNAPSHOT)
    if saved is not None and saved.compatibility.vsock != "user":
        raise VMError(
            f"snapshot {saved.name!r}: has the kernel's vsock device, and its clones can share no directory; "
            f"save it again: caisson save-snapshot {saved.name} --image {saved.image} --vsock user"
        )
    return saved
