"""What `delete` does: clean up after a container, from its bundle alone, however its shim has ended.

containerd calls it after every container whose `start` it called, also in a pod that goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from caisson.agent.shim import mounts
from caisson.agent.shim.bundle import KILLED, BundleRecord, TaskBundle
from caisson.proto.containerd import task_v2_pb2

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable

    from caisson.agent.pods.machines import Machines


def delete(bundle: TaskBundle, make_machines: Callable[[], Machines]) -> bytes:
    """Clean up and return an encoded DeleteResponse.  A pod whose shim lives is left alone.

    containerd waits five seconds, and mostly there is no VM to end: what that takes is imported for it alone.
    Raises MachineError when the VM does not stop.
    """
    record = bundle.read()
    if record is not None:
        mounts.release(Path(record.directory) / "shared" / bundle.id)
        if record.owner and not record.shim.alive:
            _end_pod(record, make_machines())
    mounts.unmount_rootfs(bundle.path)
    response = task_v2_pb2.DeleteResponse(exit_status=KILLED)
    response.exited_at.seconds, response.exited_at.nanos = divmod(time.time_ns(), 1_000_000_000)
    return response.SerializeToString()


def _end_pod(record: BundleRecord, machines: Machines) -> None:
    try:
        machines.stop(record.machine)
    finally:
        if record.holder.alive:
            with contextlib.suppress(ProcessLookupError):  # it ends with its shim, by itself
                os.kill(record.holder.pid, signal.SIGKILL)
        mounts.release(Path(record.directory))
        if record.cgroups:
            _remove_cgroup(record)


def _remove_cgroup(record: BundleRecord) -> None:
    import asyncio

    from caisson.agent.shim.cgroup import CgroupError, remove

    with contextlib.suppress(CgroupError):
        asyncio.run(remove(record.cgroups))
