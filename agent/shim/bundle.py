"""A container's bundle: its configuration, its pod, and the shim's record in it.

`delete` works from the record if the shim was killed.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from caisson.agent.shim.launch import group_of
from caisson.proto.record import NOTHING, Record

#: Exit status of a process whose VM has exited: as if killed.
KILLED = 137

#: The shim's own file in a bundle.
RECORD = "caisson.json"

#: Annotations that CRI plugins set on containers of a pod.
CONTAINER_TYPE = "io.kubernetes.cri.container-type"
SANDBOX_MEMORY = "io.kubernetes.cri.sandbox-memory"


class ProcessId(Record):
    """A process identified despite pid reuse: its pid, and its start time (clock ticks since boot)."""

    pid: int
    start_time: int

    @classmethod
    def of(cls, pid: int) -> ProcessId:
        """Return the id of a running process.  Raises OSError."""
        return cls(pid, _start_time(pid))

    @property
    def alive(self) -> bool:
        """Whether it is still running."""
        try:
            return _start_time(self.pid) == self.start_time
        except OSError:
            return False

    def ends(self, timeout: float) -> bool:
        """Wait for its exit; False if it is still running after ``timeout`` seconds."""
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return True
        try:
            return not self.alive or bool(select.select([pidfd], [], [], timeout)[0])
        finally:
            os.close(pidfd)


class BundleRecord(Record):
    """The data for `delete`: the pod, its VM, its directory, and the processes on the host."""

    sandbox: str
    owner: bool  # whether the VM stops with this container
    machine: str
    directory: str
    shim: ProcessId
    holder: ProcessId
    cgroups: Mapping[str, str] = NOTHING  # of the pod on the host: directories by controllers
    helpers: Sequence[ProcessId] = ()  # processes of the VM started before it
    ending: bool = False  # whether the shim is cleaning up itself; it removes the record at the end


class TaskBundle:
    """A bundle's directory."""

    def __init__(self, path: str | Path, container_id: str) -> None:
        self.path = Path(path).absolute()
        self.id = container_id

    def config(self) -> dict[str, Any]:
        """Read config.json.  Raises OSError or ValueError."""
        document = json.loads((self.path / "config.json").read_bytes())
        if not isinstance(document, dict):
            raise ValueError(f"{self.path / 'config.json'}: not an object")
        return document

    @property
    def sandbox(self) -> str:
        """The id of the pod, which is the container's own outside of pods."""
        return group_of(str(self.path)) or self.id

    def write(self, record: BundleRecord) -> None:
        """Store the record atomically.  Raises OSError."""
        document = {**vars(record), "shim": vars(record.shim), "holder": vars(record.holder)}
        document["helpers"] = [vars(helper) for helper in record.helpers]
        passing = self.path / f".{RECORD}"
        passing.write_text(json.dumps(document))
        passing.replace(self.path / RECORD)

    def read(self) -> BundleRecord | None:
        """Return the record; None if it is missing or invalid."""
        try:
            document: dict[str, Any] = json.loads((self.path / RECORD).read_text())
            document |= {name: ProcessId(**document[name]) for name in ("shim", "holder")}
            document["helpers"] = [ProcessId(**helper) for helper in document["helpers"]]
            return BundleRecord(**document)
        except (OSError, ValueError, TypeError, KeyError, AttributeError):
            return None

    def forget(self) -> None:
        """Remove the record: nothing is left to do."""
        (self.path / RECORD).unlink(missing_ok=True)


def _start_time(pid: int) -> int:
    """Read field 22 of /proc/PID/stat: proc(5).  The command may contain spaces and parentheses."""
    with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123
        fields = file.read().rpartition(b")")[2].split()
    if fields[0] == b"Z":
        raise ProcessLookupError(3, os.strerror(3))
    return int(fields[19])
