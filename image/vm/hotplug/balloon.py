"""Memory that a guest hands back: a balloon in it, blown up and let down by QEMU's monitor.

A guest that runs out of memory takes it back (deflate-on-oom).  Source: virtio 1.2, 5.5; QEMU, qapi/machine.json.
"""

from __future__ import annotations

import time

from caisson.image.vm.errors import VMError
from caisson.image.vm.machine import VM
from caisson.image.vm.qmp import QMP, QMPError

#: MiB that a guest is left with at least: what one can boot with.
LEAST = 128

#: Seconds without any progress after which a guest has done what it can, and between looks.
STALLED = 10.0
INTERVAL = 0.02

#: Seconds for a monitor that others may use at the moment, where the answer is only of interest.
GLANCE = 1.0


def memory_now(vm: VM) -> int | None:
    """The MiB that a guest has at present; None when QEMU does not say."""
    try:
        with QMP(vm.directory / "qmp.sock", GLANCE) as monitor:
            return _actual(monitor)
    except QMPError:
        return None


def set_memory(vm: VM, mebibytes: int) -> int:
    """Have a guest keep so much; returns what it has then, which is more when it needs more.  Raises VMError."""
    with QMP(vm.directory / "qmp.sock", 30.0) as monitor:
        most = vm.info["memory"] + sum(
            device["data"]["size"] >> 20 for device in monitor.execute("query-memory-devices")
        )
        if not LEAST <= mebibytes <= most:
            raise VMError(f"VM {vm.name!r} can have {LEAST} to {most} MiB, not {mebibytes}")
        monitor.execute("balloon", {"value": mebibytes << 20})
        found, since = _actual(monitor), time.monotonic()
        while found != mebibytes and time.monotonic() < since + STALLED:
            time.sleep(INTERVAL)
            before, found = found, _actual(monitor)
            if found != before:
                since = time.monotonic()
    return found


def _actual(monitor: QMP) -> int:
    return int(monitor.execute("query-balloon")["actual"]) >> 20
