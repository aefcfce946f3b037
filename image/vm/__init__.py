"""Virtual machines: `VM.start` boots an image, `find_vm`, `get_vm` and `list_vms` find what runs.

with VM.start(VMConfig(image), ready=lambda socket: …) as vm:
    …                                   # vm.agent_socket leads to the agent
"""

from caisson.image.vm.config import VMConfig
from caisson.image.vm.errors import VMError
from caisson.image.vm.machine import VM, find_vm, get_vm, list_vms

__all__ = ["VM", "VMConfig", "VMError", "find_vm", "get_vm", "list_vms"]
