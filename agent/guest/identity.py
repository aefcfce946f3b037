"""Set the guest's host name and machine id (machine-id(5)), which a clone of a snapshot needs to replace."""

from __future__ import annotations

import os
import re
import socket

from caisson.agent.base import syscalls
from caisson.agent.base.errors import InvalidArgument, SystemCallFailed, reason
from caisson.agent.base.syscalls import MS_BIND

#: Where programs read the id, and the writable file bound over it: the guest's root is read-only.
MACHINE_ID, WRITABLE = "/etc/machine-id", "/run/machine-id"


def identify(hostname: str, machine_id: str, kept: str = WRITABLE) -> None:
    """Set host name and machine id.  Raises InvalidArgument or SystemCallFailed."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", hostname):
        raise InvalidArgument(f"{hostname!r} is not a valid host name")
    if not re.fullmatch(r"[0-9a-f]{32}", machine_id) or not machine_id.strip("0"):
        raise InvalidArgument(f"{machine_id!r} is not a machine id of 32 hexadecimal digits")
    try:
        socket.sethostname(hostname)
        with open(kept, "w") as file:  # noqa: PTH123 - as everywhere in the guest
            file.write(f"{machine_id}\n")
        if os.path.exists(MACHINE_ID) and not os.path.samefile(MACHINE_ID, kept):  # noqa: PTH110, PTH121
            syscalls.mount(kept, MACHINE_ID, None, MS_BIND)
    except OSError as error:
        raise SystemCallFailed(f"the guest could not be identified: {reason(error)}") from error
