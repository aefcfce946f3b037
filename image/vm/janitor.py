"""Cleaning up after a supervisor that was killed: it cannot do so itself.

A shell, in a session of its own, waits for end of file on a pipe that only the supervisor holds.  It starts before the
VM's directory is made, so that there is no moment at which a kill would leave something behind.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
from collections.abc import Iterator

from caisson.image.vm.directory import VMDirectory

#: $1 the VM's directory, $2 the supervisor's process group, $3 the directory of all VMs.  `done` on the pipe: there is
#: nothing to clean.  The kernel may close the pipe of a dying process before its lock, hence the first flock(1).  The
#: others hold the lock that makes and removes directories (see directory.py) and look again: what is locked by now
#: belongs to a new VM of the same name, and what is neither locked nor empty is somebody else's.
SCRIPT = """
IFS= read -r word
[ "$word" = done ] && exit
kill -KILL "-$2"
[ -e "$1/lock" ] || exec flock -- "$3" rmdir -- "$1"
flock --wait 2 -- "$1/lock" true && exec flock -- "$3" flock --nonblock -- "$1/lock" rm -rf -- "$1"
"""


@contextlib.contextmanager
def janitor(directory: VMDirectory) -> Iterator[None]:
    """Have a VM's directory, and this process's group, cleaned up should this process be killed meanwhile."""
    reading, writing = os.pipe()
    quiet = subprocess.DEVNULL
    root = str(directory.path.parent)
    words = ["/bin/sh", "-c", SCRIPT, "caisson-janitor", str(directory.path), str(os.getpgrp()), root]
    shell = subprocess.Popen(words, stdin=reading, stdout=quiet, stderr=quiet, cwd="/", start_new_session=True)
    os.close(reading)
    try:
        yield
    finally:
        with contextlib.suppress(BrokenPipeError):
            os.write(writing, b"done\n")
        os.close(writing)
        shell.wait()
