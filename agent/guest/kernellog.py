"""Read the kernel's log, with records that relate its clock to CLOCK_MONOTONIC.

Source: Documentation/ABI/testing/dev-kmsg.
"""

from __future__ import annotations

import os

from caisson.agent.base.boot_timestamps import now
from caisson.proto.contract import CLOCK_LINE

DEVICE = "/dev/kmsg"

#: Bytes of a record at most (the kernel's PRINTKRB_RECORD_MAX), with room to spare.
RECORD = 8192

#: Number of clock records: the delay between reading the clock and writing it is least in one of them.
CLOCK_RECORDS = 3


def read_kernel_log() -> str:
    """Return all records, from the oldest still in the buffer to our own clock records.

    Raises OSError.
    """
    fd = os.open(DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        for _ in range(CLOCK_RECORDS):
            os.write(fd, f"<7>{CLOCK_LINE} {now()}\n".encode())
        records = []
        while True:
            try:
                records.append(os.read(fd, RECORD))
            except BlockingIOError:
                return b"".join(records).decode(errors="replace")
            except BrokenPipeError:
                pass  # the next records were overwritten; go on with the oldest still there
    finally:
        os.close(fd)
