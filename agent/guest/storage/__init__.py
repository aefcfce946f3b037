"""Storages: what the host has mounted in the guest before a container, or all of a sandbox, uses it."""

from caisson.agent.guest.storage.mounts import open_point
from caisson.agent.guest.storage.storages import DRIVERS, MODULES, FsGroup, Storage, Storages

__all__ = ["DRIVERS", "MODULES", "FsGroup", "Storage", "Storages", "open_point"]
