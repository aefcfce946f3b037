"""Giving a running VM more CPUs and more memory, by QEMU's monitor.  The guest's agent switches them on (OnlineCPUMem).

Source: QEMU, docs/system/cpu-hotplug.rst and docs/memory-hotplug.txt.
"""

from __future__ import annotations

from caisson.image.vm.errors import VMError
from caisson.image.vm.machine import VM
from caisson.image.vm.qmp import QMP

#: MiB that memory is plugged in by: the size of a block that Linux switches on (x86, below 64 GiB).
BLOCK = 128


def plug_cpus(vm: VM, count: int) -> None:
    """Add ``count`` CPUs.  Raises VMError when the VM has no place for so many; it has them all then, or none."""
    with QMP(vm.directory / "qmp.sock", 10.0) as monitor:
        places = [place for place in monitor.execute("query-hotpluggable-cpus") if "qom-path" not in place]
        if len(places) < count:
            raise VMError(
                f"VM {vm.name!r} has room for {len(places)} more CPUs, not {count}; "
                "how many there can be is said when it boots: --max-cpus"
            )
        # The list is in descending order; the kernel numbers CPUs as they come.
        for place in list(reversed(places))[:count]:
            name = "cpu-" + "-".join(str(value) for value in place["props"].values())
            monitor.execute("device_add", {"driver": place["type"], "id": name, **place["props"]})


def plug_memory(vm: VM, mebibytes: int) -> None:
    """Add memory, a multiple of 128 MiB.  Raises VMError when the VM has no room for it."""
    if mebibytes <= 0 or mebibytes % BLOCK:
        raise VMError(f"memory is plugged in by multiples of {BLOCK} MiB, not {mebibytes}")
    with QMP(vm.directory / "qmp.sock", 10.0) as monitor:
        plugged = monitor.execute("query-memory-devices")
        have = vm.info["memory"] + sum(device["data"]["size"] for device in plugged) // 2**20
        if have + mebibytes > vm.info["max_memory"]:
            raise VMError(
                f"VM {vm.name!r} has {have} MiB and can have {max(have, vm.info['max_memory'])}; "
                "how much there can be is said when it boots: --max-memory"
            )
        name = f"memory{len(plugged)}"
        # Shared, as the memory it booted with: a vhost-user device maps it.
        backend = {"qom-type": "memory-backend-memfd", "id": f"{name}-ram", "size": mebibytes * 2**20, "share": True}
        monitor.execute("object-add", backend)
        try:
            monitor.execute("device_add", {"driver": "pc-dimm", "id": name, "memdev": f"{name}-ram"})
        except VMError:
            monitor.execute("object-del", {"id": f"{name}-ram"})
            raise
