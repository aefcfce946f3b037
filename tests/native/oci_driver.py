"""The OCI command line in a process that nsexec can be stopped in: `python -I -S oci_driver.py PACKAGES ARGUMENT…`.

A test build of nsexec stands still at the point that _CAISSON_FAULT names (agent/nsexec/faults.h).  The process fails
if an event loop was imported.
"""

import os
import sys

sys.path.insert(0, sys.argv.pop(1))

from caisson.agent.libcontainer.process.nsexec import Nsexec
from caisson.agent.runtime.main import main

spawn = Nsexec.spawn


def spawn_faulty(self, stdio, passed, env):  # type: ignore[no-untyped-def]
    """Tell nsexec where to stand still."""
    return spawn(self, stdio, passed, {**env, "_CAISSON_FAULT": os.environ.get("_CAISSON_FAULT", "")})


if __name__ == "__main__":
    Nsexec.spawn = spawn_faulty  # type: ignore[method-assign]
    status = main()
    assert "asyncio" not in sys.modules
    sys.exit(status)
