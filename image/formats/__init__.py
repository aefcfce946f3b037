"""The forms a root file system is packed in: initramfs, disks, partition tables, hash trees."""
