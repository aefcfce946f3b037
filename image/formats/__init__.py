"""Formats of a packed root file system: initramfs, disks, partition tables, hash trees."""
