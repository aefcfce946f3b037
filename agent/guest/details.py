"""Facts about the guest that a host needs for hot-plug."""

from __future__ import annotations

BLOCK_SIZE = "/sys/devices/system/memory/block_size_bytes"
PROBE = "/sys/devices/system/memory/probe"
ACPI_HOTPLUG = "/sys/firmware/acpi/hotplug/memory/enabled"


def _read(file: str) -> str | None:
    try:
        with open(file) as stream:  # noqa: PTH123 - no pathlib at start
            return stream.read().strip()
    except OSError:
        return None


def memory_block_size() -> int:
    """Return the size in bytes of a block of hot-plugged memory; 0 if the kernel does not support it.

    Source: Documentation/ABI/testing/sysfs-devices-memory (the file is hexadecimal).
    """
    return int(_read(BLOCK_SIZE) or "0", 16)


def memory_probe() -> bool:
    """Return whether hot-plugged memory must be probed by address: there is a probe file, and no ACPI."""
    import os

    return os.path.exists(PROBE) and _read(ACPI_HOTPLUG) != "1"  # noqa: PTH110 - no pathlib at start


def supports_seccomp() -> bool:
    """Return whether the kernel filters system calls (seccomp(2)), according to the process's own status."""
    return "\nSeccomp:" in (_read("/proc/self/status") or "")
