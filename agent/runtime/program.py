"""Find nsexec, which containers are made with; it is built where it was not installed."""

from __future__ import annotations

import os

from caisson.agent.runtime.errors import CommandError

VARIABLE = "CAISSON_NSEXEC"
SOURCES = (".c", ".h", "Makefile")


def find() -> str:
    """Return the path of nsexec.  Raises CommandError."""
    named = os.environ.get(VARIABLE)
    if named:
        return named
    sources = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}/nsexec"  # noqa: PTH100, PTH120
    if os.path.exists(f"{sources}/nsexec"):  # noqa: PTH110 - installed with the package
        return f"{sources}/nsexec"
    program = f"{_cache()}/nsexec-{_key(sources)}/nsexec"
    if not os.path.exists(program):  # noqa: PTH110
        _build(sources, os.path.dirname(program))  # noqa: PTH120
    return program


def _cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or f"{os.path.expanduser('~') or '/root'}/.cache/caisson"  # noqa: PTH111


def _key(sources: str) -> str:
    """Name what the sources are now, by their sizes and times."""
    key = 0
    for entry in sorted(os.scandir(sources), key=lambda one: one.name):
        if entry.name.endswith(SOURCES):
            stat = entry.stat()
            key = (key * 31 + stat.st_mtime_ns + stat.st_size) % (1 << 61)
    return f"{key:x}"


def _build(sources: str, directory: str) -> None:
    """Build it beside its place, so that two commands at once do not write one file.  Raises CommandError."""
    import shutil
    import subprocess

    beside = f"{directory}.{os.getpid()}"
    command = ["make", "-s", "-C", sources, f"BUILD={beside}"]
    try:
        os.makedirs(beside)  # noqa: PTH103
        made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    except OSError as error:
        raise CommandError(f"nsexec: cannot be built: {error}; install make and musl-gcc, or set {VARIABLE}") from None
    try:
        if made.returncode != 0:
            said = made.stderr.strip().splitlines()
            why = said[-1] if said else "make failed"
            raise CommandError(f"nsexec: cannot be built: {why}; install make and musl-gcc, or set {VARIABLE}")
        os.rename(beside, directory)  # noqa: PTH104
    except OSError:  # another command was faster
        pass
    finally:
        shutil.rmtree(beside, ignore_errors=True)
