"""Network interfaces for a running VM: a host tap device, plugged in as virtio-net through QEMU's monitor.

Source: QEMU, qapi/net.json (NetdevTapOptions), qapi/misc.json (getfd).
"""

from __future__ import annotations

from caisson.image.vm.hotplug.disks import empty_port, monitor_of, plugged
from caisson.image.vm.qmp import QMPError
from caisson.image.vm.running import RunningVM

PREFIX = "nic-"


def plug_interface(vm: RunningVM, tap: int, mac: str) -> None:
    """Plug in an interface with this MAC address, whose frames go through a tap device's descriptor (IFF_VNET_HDR).

    QEMU gets a duplicate of the descriptor.  Raises VMError when no port is empty.
    """
    with monitor_of(vm) as monitor:
        taken = {name for devices in plugged(monitor).values() for name in devices}
        number = next(n for n in range(len(taken) + 1) if f"{PREFIX}{n}" not in taken)
        bus, name = empty_port(monitor, vm.name), f"{PREFIX}{number}"
        monitor.execute("getfd", {"fdname": name}, fds=[tap])
        monitor.execute("netdev_add", {"type": "tap", "id": f"net-{name}", "fd": name})
        device = {"driver": "virtio-net-pci", "id": name, "netdev": f"net-{name}", "mac": mac, "bus": bus}
        try:
            monitor.execute("device_add", device | {"romfile": ""})
        except QMPError:
            monitor.execute("netdev_del", {"id": f"net-{name}"})
            raise
