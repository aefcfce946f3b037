"""Start a command line: the entry point of `caisson`.

First defer modules that few commands use, ours and the standard library's: asyncio alone imports TLS and inspect.
"""

from __future__ import annotations

import os
import signal
import sys
from importlib import import_module

from caisson.agent.base import lazyimport

DEFERRED = (*lazyimport.LATE, "asyncio", "difflib", "ipaddress", "platform", "shutil", "ssl", "textwrap", "traceback")


def main(more: str = "") -> int:
    """Run sys.argv's command line and return its exit status; ``more`` is a module with a GROUP of other commands."""
    interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # and not in a job that ignores it
    if interruptible:  # Ctrl-C during imports exits without a traceback, as at any other time
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    sys.meta_path.insert(0, lazyimport.LazyImporter(DEFERRED))
    from caisson.commands.main import main as run

    if interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    status = run(None, *([import_module(more).GROUP] if more else []))
    if lazyimport.active_importers():  # a short command: interpreter shutdown would be a fifth of its time
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
