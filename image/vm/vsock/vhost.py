"""The kernel's vsock device (vhost-vsock): an open device that owns a context id.

Sources: vsock(7); Linux, include/uapi/linux/vhost.h and drivers/vhost/vsock.c (VHOST_VSOCK_SET_GUEST_CID).
"""

from __future__ import annotations

import errno
import fcntl
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path

from caisson.image.vm.accel import VHOST_VSOCK
from caisson.image.vm.errors import VMError

#: _IOW(VHOST_VIRTIO, 0x60, __u64)
VHOST_VSOCK_SET_GUEST_CID = 0x4008AF60

#: Ids 0-2 have a meaning of their own (vsock(7)); the upper half is left to those who choose by hand.
FIRST_CID, LAST_CID = 3, 0x7FFFFFFF

ATTEMPTS = 100


def allocate(device: Path = VHOST_VSOCK, ioctl: Callable[[int, int, bytes], object] = fcntl.ioctl) -> tuple[int, int]:
    """An open /dev/vhost-vsock that owns a free CID, and that CID.

    The kernel refuses a CID that is in use, and keeps it for as long as the device is open, so two VMs started at once
    cannot get the same one.  Raises VMError.
    """
    try:
        descriptor = os.open(device, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise VMError(f"{device} cannot be opened: {os.strerror(error.errno or 0)}") from error
    try:
        for _ in range(ATTEMPTS):
            cid = random.randint(FIRST_CID, LAST_CID)
            try:
                ioctl(descriptor, VHOST_VSOCK_SET_GUEST_CID, struct.pack("=Q", cid))
                return descriptor, cid
            except OSError as error:
                if error.errno != errno.EADDRINUSE:
                    raise VMError(f"{device} refuses a guest CID: {os.strerror(error.errno or 0)}") from error
        raise VMError(f"{device}: no free guest CID in {ATTEMPTS} attempts")
    except VMError:
        os.close(descriptor)
        raise
