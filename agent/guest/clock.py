"""The guest's clock and random numbers, which a host sets after it has stopped or cloned a guest."""

from __future__ import annotations

import os
import time

from caisson.agent.base.errors import InvalidArgument, MissingArgument, SystemCallFailed, reason

RNDADDTOENTCNT, RNDRESEEDCRNG = 0x40045201, 0x5207  # random(4)


def set_time(seconds: int, microseconds: int) -> None:
    """Set the clock, to a time since the epoch.  Raises InvalidArgument or SystemCallFailed."""
    if not 0 <= microseconds < 1_000_000:
        raise InvalidArgument(f"Could not set guest time: {microseconds} is not below a million microseconds")
    try:
        time.clock_settime_ns(time.CLOCK_REALTIME, (seconds * 1_000_000 + microseconds) * 1000)
    except OverflowError:
        raise InvalidArgument(
            f"Could not set guest time: {seconds} seconds are beyond what the kernel can count"
        ) from None
    except OSError as error:
        raise SystemCallFailed(f"Could not set guest time: {reason(error)}") from error


def reseed(data: bytes) -> None:
    """Add external entropy to the kernel's random number generator, and reseed it.

    Raises MissingArgument or SystemCallFailed.

    All of it is credited: if the host's bytes are not random, the guest is lost anyway.
    """
    import fcntl
    import struct

    if not data:
        raise MissingArgument("missing entropy data")
    try:
        fd = os.open("/dev/random", os.O_WRONLY | os.O_CLOEXEC)
        try:
            os.write(fd, data)
            fcntl.ioctl(fd, RNDADDTOENTCNT, struct.pack("i", min(len(data), 4096) * 8))
            fcntl.ioctl(fd, RNDRESEEDCRNG)
        finally:
            os.close(fd)
    except OSError as error:
        raise SystemCallFailed(f"Could not reseed the random numbers: {reason(error)}") from error
