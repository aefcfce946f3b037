"""Find nsexec, which creates containers; build it, together with the front, if it is not installed."""

from __future__ import annotations

import os

from caisson.agent.runtime.errors import CommandError

VARIABLE = "CAISSON_NSEXEC"
SOURCES = (".c", ".h", "Makefile")
NSEXEC, FRONT = "nsexec", "caisson-oci"


def find() -> str:
    """Return the path of nsexec.  Raises CommandError."""
    named = os.environ.get(VARIABLE)
    if named:
        return named
    sources = f"{os.path.dirname(os.path.dirname(os.path.abspath(__file__)))}/nsexec"  # noqa: PTH100, PTH120
    if os.path.exists(f"{sources}/{NSEXEC}"):  # noqa: PTH110 - installed with the package
        return f"{sources}/{NSEXEC}"
    beside = f"{sources}/build"  # commands/caisson-oci looks for the front there
    if _is_built(beside, sources):
        return f"{beside}/{NSEXEC}"
    directory = beside if os.access(sources, os.W_OK) else f"{_cache()}/nsexec-{_key(sources)}"
    if directory == beside or not os.path.exists(f"{directory}/{NSEXEC}"):  # noqa: PTH110
        _build(sources, directory)
    return f"{directory}/{NSEXEC}"


def _is_built(directory: str, sources: str) -> bool:
    """Return whether both programs exist, and are newer than their sources."""
    try:
        built = min(os.stat(f"{directory}/{name}").st_mtime_ns for name in (NSEXEC, FRONT))  # noqa: PTH116
    except OSError:
        return False
    return all(entry.stat().st_mtime_ns < built for entry in _files(sources))


def _files(sources: str) -> list[os.DirEntry[str]]:
    found = [entry for place in (sources, f"{sources}/front") for entry in os.scandir(place)]
    return sorted((entry for entry in found if entry.name.endswith(SOURCES)), key=lambda entry: entry.path)


def _cache() -> str:
    return os.environ.get("XDG_CACHE_HOME") or f"{os.path.expanduser('~') or '/root'}/.cache/caisson"  # noqa: PTH111


def _key(sources: str) -> str:
    """Return a key of the current sources, by their sizes and times."""
    key = 0
    for entry in _files(sources):
        stat = entry.stat()
        key = (key * 31 + stat.st_mtime_ns + stat.st_size) % (1 << 61)
    return f"{key:x}"


def _build(sources: str, directory: str) -> None:
    """Build both under temporary names, so that two concurrent commands do not write one file.  Raises CommandError."""
    import shutil
    import subprocess

    beside = f"{directory}.{os.getpid()}"
    command = ["make", "-s", "-C", sources, f"BUILD={beside}", NSEXEC, "front"]
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
        os.makedirs(directory, exist_ok=True)  # noqa: PTH103
        for name in (NSEXEC, FRONT):
            os.replace(f"{beside}/{name}", f"{directory}/{name}")  # noqa: PTH105
    finally:
        shutil.rmtree(beside, ignore_errors=True)
