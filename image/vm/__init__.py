"""Virtual machines: `VM.start` boots an image, `find_vm`, `get_vm` and `list_vms` find running ones.

with VM.start(VMConfig(image), ready=lambda socket: …) as vm:
    …                                   # vm.agent_socket leads to the agent

Modules are imported on first use: checking whether a VM is running needs no QEMU.
"""

from __future__ import annotations

import importlib

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

    from caisson.image.vm.config import VMConfig
    from caisson.image.vm.errors import VMError
    from caisson.image.vm.machine import VM
    from caisson.image.vm.running import RunningVM, find_vm, get_vm, list_vms

_FROM = {
    "RunningVM": "caisson.image.vm.running",
    "VM": "caisson.image.vm.machine",
    "VMConfig": "caisson.image.vm.config",
    "VMError": "caisson.image.vm.errors",
    "find_vm": "caisson.image.vm.running",
    "get_vm": "caisson.image.vm.running",
    "list_vms": "caisson.image.vm.running",
}

__all__ = ["VM", "RunningVM", "VMConfig", "VMError", "find_vm", "get_vm", "list_vms"]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_FROM[name]), name)
