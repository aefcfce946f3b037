"""The kernel's security modules that label processes."""

from __future__ import annotations


def has_apparmor() -> bool:
    """Return whether AppArmor is in force.  Source: Documentation/admin-guide/LSM/apparmor.rst"""
    return "Y" in _read("/sys/module/apparmor/parameters/enabled")


def has_selinux() -> bool:
    """Return whether SELinux is enabled: only then its file system exists."""
    return "selinuxfs" in _read("/proc/filesystems")


def _read(path: str) -> str:
    try:
        with open(path) as file:  # noqa: PTH123 - no pathlib at start
            return file.read()
    except OSError:
        return ""
