"""What `delete` does: clean up after a container, from its bundle alone, however its shim has ended.

containerd calls it after every container whose `start` it called, also in a pod that goes on.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from pathlib import Path

from caisson.agent.rpc.wire import encode
from caisson.agent.shim import mounts
from caisson.agent.shim.bundle import KILLED, BundleRecord, TaskBundle

#: Seconds for a shim that is ending its pod, and for its processes once it was killed.
ENDING_TIMEOUT = 3.0
HELPER_TIMEOUT = 1.0

#: Fields of a containerd.task.v2.DeleteResponse; those of a Timestamp are 1 and 2.
EXIT_STATUS, EXITED_AT = 2, 3

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
    if record is not None and record.ending and record.shim.ends(ENDING_TIMEOUT):
        record = bundle.read()  # none, unless the shim was killed
    if record is not None:
        mounts.release(Path(record.directory) / "shared" / bundle.id)
        if record.owner and not record.shim.alive:
            _end_pod(record, make_machines())
    mounts.unmount_rootfs(bundle.path)
    seconds, nanoseconds = divmod(time.time_ns(), 1_000_000_000)
    exited_at = encode([(1, seconds), (2, nanoseconds)])
    return encode([(EXIT_STATUS, KILLED), (EXITED_AT, exited_at)])


def _end_pod(record: BundleRecord, machines: Machines) -> None:
    try:
        machines.stop(record.machine)
        for helper in record.helpers:  # they end with the shim, after what they are at
            if not helper.ends(HELPER_TIMEOUT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(helper.pid, signal.SIGKILL)
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
