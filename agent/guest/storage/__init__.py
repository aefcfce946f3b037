"""Storages: mounts made in the guest for the host, before a container or sandbox uses them."""

from caisson.agent.guest.storage.mounts import open_point
from caisson.agent.guest.storage.storages import DRIVERS, MODULES, FsGroup, Storage, Storages

__all__ = ["DRIVERS", "MODULES", "FsGroup", "Storage", "Storages", "open_point"]
