"""Run the OCI command line so that it can be killed: `python -I -S oci_driver.py PACKAGES ARGUMENT…`.

_CAISSON_FAULT names a point.  The command is killed at one of its own (agent/libcontainer/faults.py); a test build of
nsexec stops at one of its own (agent/nsexec/faults.h).  The process fails if an event loop was imported.
"""

import os
import signal
import sys

sys.path.insert(0, sys.argv.pop(1))

from caisson.agent.libcontainer import faults
from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.runtime.main import main

WANTED = os.environ.get("_CAISSON_FAULT", "")
spawn = Nsexec.spawn


def spawn_faulty(self, stdio, passed, env):  # type: ignore[no-untyped-def]
    """Tell nsexec where to stop."""
    return spawn(self, stdio, passed, {**env, "_CAISSON_FAULT": WANTED})


def die(point: str) -> None:
    """Kill this process, as if by chance."""
    if point == WANTED:
        os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    Nsexec.spawn = spawn_faulty  # type: ignore[method-assign]
    faults.reach = die
    status = main()
    assert "asyncio" not in sys.modules
    sys.exit(status)
