"""Kata's remote hypervisor: a service by which an unmodified Kata 3.x shim runs its pods in our VMs."""
