"""`delete`: clean up after a container from its bundle alone, however its shim has exited.

containerd calls it for every container whose `start` it called, even if the pod continues.
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

#: Seconds for a shim to end its pod, and for its processes to exit once killed.
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

    containerd waits five seconds, and usually there is no VM to stop: the imports for that are late.
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
        for helper in record.helpers:  # they exit with the shim, after their current work
            if not helper.ends(HELPER_TIMEOUT):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(helper.pid, signal.SIGKILL)
    finally:
        if record.holder.alive:
            with contextlib.suppress(ProcessLookupError):  # it exits by itself, with its shim
                os.kill(record.holder.pid, signal.SIGKILL)
        mounts.release(Path(record.directory))
        if record.cgroups:
            _remove_cgroup(record)


def _remove_cgroup(record: BundleRecord) -> None:
    import asyncio

    from caisson.agent.shim.cgroup import CgroupError, remove

    with contextlib.suppress(CgroupError):
        asyncio.run(remove(record.cgroups))
