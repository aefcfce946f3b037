"""Start a command line: the entry point of `caisson`.

Modules that few commands use are deferred first, here and in the standard library: asyncio alone imports TLS and the
inspection of source code.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

from caisson.agent.base import lazyimport

DEFERRED = (*lazyimport.LATE, "difflib", "platform", "shutil", "ssl", "textwrap", "traceback")


def main(more: str = "") -> int:
    """Run sys.argv's command line and return its exit status; ``more`` is a module with a GROUP of other commands."""
    sys.meta_path.insert(0, lazyimport.LazyImporter(DEFERRED))
    from caisson.commands.main import main as run

    status = run(None, *([import_module(more).GROUP] if more else []))
    if lazyimport.deferring():  # it was a short one, and to take down what was imported would be a fifth of its time
        sys.stderr.flush()
        os._exit(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
