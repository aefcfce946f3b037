"""CPUs and memory of a running VM: plugged in, and for memory returned through the balloon, by QEMU's monitor.

The guest's agent brings plugged resources online (OnlineCPUMem); a guest that runs out of memory deflates the balloon
by itself (deflate-on-oom).  Sources: QEMU, docs/system/cpu-hotplug.rst, docs/memory-hotplug.txt, qapi/machine.json;
virtio 1.2, section 5.5.
"""

from __future__ import annotations

import time
from _queue import SimpleQueue
from _thread import start_new_thread
from collections.abc import Sequence

from caisson.image.vm.errors import VMError
from caisson.image.vm.hotplug.disks import monitor_of
from caisson.image.vm.pace import scaled
from caisson.image.vm.qmp import QMP, QMPError
from caisson.image.vm.running import RunningVM

#: MiB of one memory block, the unit that Linux brings online (x86, below 64 GiB).
MEMORY_BLOCK = 128

#: Minimum MiB of a guest: enough to boot.
MIN_MEMORY = 128

#: Timeouts of the monitor in seconds: to plug, to resize, and for queries.
PLUG_TIMEOUT = 10.0
BALLOON_TIMEOUT = 30.0
QUERY_TIMEOUT = 1.0

#: Seconds without progress after which a guest has returned what it can, and between polls.
STALL_TIMEOUT = 10.0
POLL_INTERVAL = 0.02


def plug_cpus(vm: RunningVM, count: int) -> None:
    """Plug in ``count`` CPUs, all or none.  Raises VMError if the VM has no room for that many."""
    with monitor_of(vm, PLUG_TIMEOUT) as monitor:
        places = [place for place in monitor.execute("query-hotpluggable-cpus") if "qom-path" not in place]
        if len(places) < count:
            raise VMError(
                f"VM {vm.name!r}: room for {len(places)} more CPUs, not {count}; "
                "set the maximum when it boots: --max-cpus"
            )
        # The list is in descending order; the kernel numbers CPUs in order of appearance.
        for place in list(reversed(places))[:count]:
            name = "cpu-" + "-".join(str(value) for value in place["props"].values())
            monitor.execute("device_add", {"driver": place["type"], "id": name, **place["props"]})


def plug_memory(vm: RunningVM, mebibytes: int) -> None:
    """Plug in memory, a multiple of 128 MiB.  Raises VMError if the VM has no room for it."""
    if mebibytes <= 0 or mebibytes % MEMORY_BLOCK:
        raise VMError(f"{mebibytes} MiB: memory is plugged in multiples of {MEMORY_BLOCK} MiB")
    with monitor_of(vm, PLUG_TIMEOUT) as monitor:
        plugged = monitor.execute("query-memory-devices")
        have = vm.info["memory"] + sum(device["data"]["size"] for device in plugged) // 2**20
        if have + mebibytes > vm.info["max_memory"]:
            raise VMError(
                f"VM {vm.name!r}: it has {have} MiB and can have {max(have, vm.info['max_memory'])}; "
                "set the maximum when it boots: --max-memory"
            )
        name = f"memory{len(plugged)}"
        # Shared, like the boot memory: a vhost-user device maps it.
        backend = {"qom-type": "memory-backend-memfd", "id": f"{name}-ram", "size": mebibytes * 2**20, "share": True}
        monitor.execute("object-add", backend)
        try:
            monitor.execute("device_add", {"driver": "pc-dimm", "id": name, "memdev": f"{name}-ram"})
        except VMError:
            monitor.execute("object-del", {"id": f"{name}-ram"})
            raise


def memory_now(vm: RunningVM) -> int | None:
    """Return the current MiB of a guest; None if QEMU does not report it."""
    try:
        with QMP(vm.directory / "qmp.sock", QUERY_TIMEOUT) as monitor:
            return _actual(monitor)
    except QMPError:
        return None


def memory_of_all(vms: Sequence[RunningVM]) -> dict[str, int | None]:
    """Return the current MiB of several guests, by name, all asked at once: a QEMU may take its time, or never answer.

    None as for one.
    """
    answers: SimpleQueue[tuple[str, int | None]] = SimpleQueue()

    def ask(vm: RunningVM) -> None:
        memory = None
        try:
            memory = memory_now(vm)
        finally:
            answers.put((vm.name, memory))

    for vm in vms:
        start_new_thread(ask, (vm,))
    return dict(answers.get() for _ in vms)


def set_memory(vm: RunningVM, mebibytes: int) -> int:
    """Inflate or deflate the balloon so that a guest has ``mebibytes``; returns the MiB it then has.

    It may keep more if it needs more.  Raises VMError for a size out of bounds.
    """
    with monitor_of(vm, BALLOON_TIMEOUT) as monitor:
        plugged = monitor.execute("query-memory-devices")
        most = vm.info["memory"] + sum(device["data"]["size"] >> 20 for device in plugged)
        if not MIN_MEMORY <= mebibytes <= most:
            raise VMError(f"VM {vm.name!r}: it can have {MIN_MEMORY} to {most} MiB, not {mebibytes}")
        monitor.execute("balloon", {"value": mebibytes << 20})
        found, since = _actual(monitor), time.monotonic()
        while found != mebibytes and time.monotonic() < since + scaled(STALL_TIMEOUT):
            time.sleep(POLL_INTERVAL)
            before, found = found, _actual(monitor)
            if found != before:
                since = time.monotonic()
    return found


def _actual(monitor: QMP) -> int:
    return int(monitor.execute("query-balloon")["actual"]) >> 20
