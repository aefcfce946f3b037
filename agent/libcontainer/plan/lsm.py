"""Which security modules the kernel has that give processes labels."""

from __future__ import annotations


def has_apparmor() -> bool:
    """Return whether AppArmor is in force.  Source: Documentation/admin-guide/LSM/apparmor.rst"""
    return "Y" in _read("/sys/module/apparmor/parameters/enabled")


def has_selinux() -> bool:
    """Return whether SELinux is: only then there is its file system."""
    return "selinuxfs" in _read("/proc/filesystems")


def _read(path: str) -> str:
    try:
        with open(path) as file:  # noqa: PTH123 - no pathlib at start
            return file.read()
    except OSError:
        return ""
