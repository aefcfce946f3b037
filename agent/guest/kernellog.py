"""The kernel's log, and what its clock has to do with others.  Source: Documentation/ABI/testing/dev-kmsg."""

from __future__ import annotations

import os

from caisson.agent.base.boot_timestamps import now
from caisson.proto.contract import CLOCK_LINE

DEVICE = "/dev/kmsg"

#: Bytes of a record at most (the kernel's PRINTKRB_RECORD_MAX), with room to spare.
RECORD = 8192

#: Times that the clock is told: what comes between reading and writing it is least in one of them.
TOLD = 3


def read_kernel_log(device: str = DEVICE) -> str:
    """All records, from the oldest that is still there to some of our own that say when they were written.

    Raises OSError.
    """
    fd = os.open(device, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for _ in range(TOLD):
            os.write(fd, f"<7>{CLOCK_LINE} {now()}\n".encode())
        records = []
        while True:
            try:
                records.append(os.read(fd, RECORD))
            except BlockingIOError:
                return b"".join(records).decode(errors="replace")
            except BrokenPipeError:
                pass  # what would have come next was overwritten; reading goes on with what is there
    finally:
        os.close(fd)
