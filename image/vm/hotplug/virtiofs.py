"""virtiofsd: a process that serves one directory of the host to a guest, as a child of the VM's supervisor.

There are two programs of this name: QEMU's own, in C, up to version 7.2 (Debian: qemu-system-common), which only root
can run, and the one in Rust that came after it (Debian: virtiofsd), for anyone.  Sources: QEMU,
docs/tools/virtiofsd.rst; virtiofsd's README.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import socket
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caisson.image.programs import which
from caisson.image.vm.children import ChildProcesses
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import VMError
from caisson.image.vm.sandbox import VIRTIOFSD, Confinement

#: The way to share without virtiofsd.
ELSE = "or share by 9p, which the lean image has: caisson boot-vm --share TAG=DIR"

#: It drops the rest itself, as MODCAPS says; the guest controls owners and set-ID bits of files.
CONFINEMENT = Confinement(VIRTIOFSD, set_id_bits=True)

#: In addition to file ownership: to create device nodes, and to set file capabilities.
MODCAPS = "-mknod:-setfcap"

#: Makes $1 read-only for this process only, and executes the rest.  Mounts below it are then missing.
READ_ONLY = 'mount --bind -- "$1" "$1" && mount -o remount,bind,ro -- "$1" && shift && exec "$@"'


def command(directory: Path, fd: int, *, writable: bool) -> list[str]:
    """Return the command that serves a directory on a listening socket; a guest cannot write to a read-only one.

    Raises VMError that says what to do instead.
    """
    program = which("virtiofsd")
    if program is None:
        raise VMError(
            "virtiofsd: is not installed; run: sudo apt-get install virtiofsd "
            f"(in Debian 12 it is in qemu-system-common); {ELSE}"
        )
    usage = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    if "--shared-dir" in usage:
        words = [program, f"--fd={fd}", f"--shared-dir={directory}"]
        if os.geteuid() == 0 and "--modcaps" in usage:
            words.append(f"--modcaps={MODCAPS}")
        sealed = [*words, "--readonly"] if "--readonly" in usage else None
    elif os.geteuid() != 0:
        raise VMError(
            f"{program}: is QEMU's own and needs root; run (from Debian 13 on): sudo apt-get install virtiofsd; {ELSE}"
        )
    else:
        escaped = str(directory).replace("\\", "\\\\").replace(",", "\\,")
        words = [program, f"--fd={fd}", "-o", f"source={escaped}", "-o", f"modcaps={MODCAPS}"]
        sealed = None
    if writable:
        return words
    if sealed is None and os.geteuid() != 0:
        raise VMError(f"{program}: is too old to share read-only without root; share --writable; {ELSE}")
    return sealed or ["unshare", "--mount", "--", "/bin/sh", "-c", READ_ONLY, "sh", str(directory), *words]


def plug(tag: str, path: str, bus: str) -> list[tuple[str, dict[str, Any]]]:
    """Return the QEMU monitor commands that plug in a share: connect to virtiofsd's socket, add the device.

    Source: QEMU, docs/interop/vhost-user.rst; qapi/char.json.
    """
    backend = {"type": "socket", "data": {"addr": {"type": "unix", "data": {"path": path}}, "server": False}}
    device = {"driver": "vhost-user-fs-pci", "id": f"share-{tag}", "chardev": f"chardev-{tag}", "tag": tag, "bus": bus}
    return [("chardev-add", {"id": f"chardev-{tag}", "backend": backend}), ("device_add", device)]


class Shares:
    """The directories of one VM served by virtiofsd: ``served`` has path and writability by tag."""

    def __init__(self, directory: VMDirectory, children: ChildProcesses, root: str = "") -> None:
        """``root`` is the tag of the share without which the VM is of no use."""
        self.served: dict[str, tuple[str, bool]] = {}
        self._directory = directory
        self._children = children
        self._sockets: dict[str, Path] = {}
        self._root = root

    def answer(self, question: Mapping[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
        """Handle a request on control.sock, and return the response.  Raises VMError."""
        if "share" in question:
            tag, path = str(question["share"]), Path(str(question.get("path")))
            namespace = fds[0] if fds else None
            return {"socket": str(self.serve(tag, path, bool(question.get("writable")), namespace))}
        if "unshare" in question:
            self._end(str(question["unshare"]))
            return {}
        raise VMError("supervisor: unknown request; give share or unshare")

    def serve(self, tag: str, path: Path, writable: bool, mount_namespace: int | None = None) -> Path:
        """Start a virtiofsd, and return its socket, which accepts connections.  Raises VMError."""
        if tag in self.served:
            raise VMError(f"{tag}: is in use for {self.served[tag][0]}")
        place = next(
            place
            for number in range(len(self._sockets) + 1)
            if (place := self._directory.path / f"fs{number}.sock") not in self._sockets.values()
        )
        with socket.socket(socket.AF_UNIX) as listener:
            words = command(path, listener.fileno(), writable=writable)
            listener.bind(str(place))
            listener.listen(1)  # so that QEMU can connect at once
            confinement = dataclasses.replace(CONFINEMENT, mount_namespace=mount_namespace)
            helper = tag != self._root
            self._children.spawn(f"virtiofsd {tag}", words, [listener.fileno()], confinement, helper=helper)
        self._sockets[tag], self.served[tag] = place, (str(path), writable)
        return place

    def _end(self, tag: str) -> None:
        if tag in self.served:
            self._children.end(f"virtiofsd {tag}")
            del self.served[tag]
            with contextlib.suppress(FileNotFoundError):
                self._sockets.pop(tag).unlink()
