"""What `delete` does: clean up after a container, from its bundle alone, however its shim has ended.

containerd calls it after every container whose `start` it called, also in a pod that goes on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from pathlib import Path

from caisson.agent.pods.machines import Machines
from caisson.agent.shim import mounts
from caisson.agent.shim.bundle import BundleRecord, TaskBundle
from caisson.agent.shim.cgroup import CgroupError, remove
from caisson.agent.shim.events import stamp
from caisson.agent.shim.process import KILLED
from caisson.proto.containerd import task_v2_pb2


def delete(bundle: TaskBundle, machines: Machines) -> bytes:
    """Clean up and return an encoded DeleteResponse.  A pod whose shim lives is left alone.

    Raises MachineError when the VM does not stop.
    """
    record = bundle.read()
    if record is not None:
        mounts.release(Path(record.directory) / "shared" / bundle.id)
        if record.owner and not record.shim.alive:
            _end_pod(record, machines)
    mounts.unmount_rootfs(bundle.path)
    response = task_v2_pb2.DeleteResponse(exit_status=KILLED)
    stamp(response.exited_at, time.time_ns())
    return response.SerializeToString()


def _end_pod(record: BundleRecord, machines: Machines) -> None:
    try:
        machines.stop(record.machine)
    finally:
        if record.holder.alive:
            with contextlib.suppress(ProcessLookupError):  # it ends with its shim, by itself
                os.kill(record.holder.pid, signal.SIGKILL)
        with contextlib.suppress(CgroupError):
            asyncio.run(remove(record.cgroups))
        mounts.release(Path(record.directory))
