"""What a host may want to know of the guest before it plugs something in."""

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
    """Bytes in a block of hot-plugged memory; 0 where the kernel knows none.

    Source: Documentation/ABI/testing/sysfs-devices-memory (the file is hexadecimal).
    """
    return int(_read(BLOCK_SIZE) or "0", 16)


def memory_probe() -> bool:
    """Whether hot-plugged memory has to be announced by writing its address: there is a file for it, and no ACPI."""
    import os

    return os.path.exists(PROBE) and _read(ACPI_HOTPLUG) != "1"  # noqa: PTH110 - no pathlib at start


def supports_seccomp() -> bool:
    """Whether the kernel filters system calls (seccomp(2)): the process's own status says so."""
    return "\nSeccomp:" in (_read("/proc/self/status") or "")
