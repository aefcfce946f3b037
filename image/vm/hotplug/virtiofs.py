"""A share by virtiofs: the command of virtiofsd, which serves one directory of the host to a guest, and the device.

There are two programs of this name: QEMU's own, in C, up to version 7.2 (Debian: qemu-system-common), which only root
can run, and the one in Rust that came after it (Debian: virtiofsd), for anyone.  Sources: QEMU,
docs/tools/virtiofsd.rst; virtiofsd's README.
"""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

from caisson.image.programs import which
from caisson.image.vm.errors import VMError

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: The way to share without virtiofsd.
ELSE = "or share by 9p, which the lean image has: caisson boot-vm --share TAG=DIR"

#: Capabilities that it drops itself: to create device nodes, and to set file capabilities.
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
