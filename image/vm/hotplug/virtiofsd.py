"""The virtiofsd processes of one VM, children of its supervisor."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

from caisson.image.vm.children import ChildProcesses
from caisson.image.vm.directory import VMDirectory
from caisson.image.vm.errors import VMError
from caisson.image.vm.hotplug.virtiofs import command
from caisson.image.vm.sandbox import VIRTIOFSD, Confinement

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: It drops what it does not need itself (virtiofs.py, MODCAPS); the guest controls owners and set-ID bits of files.
CONFINEMENT = Confinement(VIRTIOFSD, set_id_bits=True)


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
            place.unlink(missing_ok=True)  # of one that could not be started
            listener.bind(str(place))
            listener.listen(1)  # so that QEMU can connect at once
            confinement = CONFINEMENT.but(mount_namespace=mount_namespace)
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
