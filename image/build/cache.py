"""Results of build steps, keyed by the digest of their inputs.

<root>/<step>/<key>/        a finished result: it appears by rename, so it is complete
<root>/<step>/.lock-<key>   held while one is being made; a second builder of the same waits and then finds it
<root>/<step>/.making-<key> being made; left only by a build that was killed, and removed by the next one of its step
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from caisson.image.errors import ImageError
from caisson.proto.record import Record

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import IO


def default_root() -> Path:
    """Return ``$CAISSON_CACHE``, else ``$XDG_CACHE_HOME/caisson``, else ``~/.cache/caisson``."""
    if chosen := os.environ.get("CAISSON_CACHE"):
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "caisson"


#: Default bytes of results to keep, if $CAISSON_CACHE_SIZE is not set.
CAP = 4 * 10**9


def size_limit() -> int:
    """Return ``$CAISSON_CACHE_SIZE`` in bytes, else 4 GB.  Raises ImageError for an invalid number."""
    text = os.environ.get("CAISSON_CACHE_SIZE", str(CAP))
    if not text.isascii() or not text.isdecimal():
        raise ImageError(f"CAISSON_CACHE_SIZE {text!r}: is not a number of bytes; for example 4000000000")
    return int(text)


#: The message of every program for a full disk (ENOSPC).
NO_SPACE = os.strerror(errno.ENOSPC)


def digest_of(*inputs: object) -> str:
    """Return a key for these inputs (JSON values): 24 hex digits."""
    import hashlib  # late: OpenSSL is a tenth of the imports of a process that starts a VM

    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def digest_of_files(root: Path, files: list[Path]) -> str:
    """Return the digest of files' names below ``root``, modes and contents, in a fixed order."""
    import hashlib

    state = hashlib.sha256()
    for file in sorted(files):
        mode = file.stat().st_mode & 0o111
        data = file.read_bytes()
        state.update(os.fsencode(f"{file.relative_to(root)}\0{mode:o}\0{len(data)}\0"))
        state.update(data)
    return state.hexdigest()[:24]


class Removed(Record):
    """A removed result: its step, and its bytes."""

    step: str
    bytes: int


class Cache:
    """Finished results below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, step: str, key: str) -> Path | None:
        """Return the result, if it exists."""
        result = self.root / step / key
        try:
            os.utime(result / ".used")  # for trim(), which may be removing it
        except (FileNotFoundError, NotADirectoryError):
            return None
        return result

    def get_or_make(self, step: str, key: str, make: Callable[[Path], None]) -> Path:
        """Return the result of a step: cached, or created by ``make`` in an empty directory.

        A failure or an interruption leaves nothing that could be mistaken for a result.
        """
        found = self.get(step, key)
        if found is not None:
            return found
        with self._locked(step, key):
            found = self.get(step, key)  # by the previous holder of the lock
            if found is not None:
                return found
            making = self.root / step / f".making-{key}"
            try:
                self._remove_in_background(making)
                making.mkdir()
                making.chmod(0o755)
                make(making)
                (making / ".used").write_text(str(size_of(making)))
                making.rename(self.root / step / key)
            except BaseException as error:
                if isinstance(error, Exception):
                    shutil.rmtree(making, ignore_errors=True)
                else:  # the user is waiting
                    self._remove_in_background(making)
                if isinstance(error, (OSError, ImageError)) and NO_SPACE in str(error):
                    raise ImageError(
                        f"{self.root}: the disk is full; free some space, or set CAISSON_CACHE to another directory"
                    ) from error
                if isinstance(error, OSError):
                    raise ImageError(f"{step}: {error}") from error
                raise
        return self.root / step / key

    def _remove_in_background(self, making: Path) -> None:
        """Move an unfinished result out of the way, and remove it in the background: a kernel tree takes many
        seconds.
        """
        gone = making.with_name(f".making-{os.urandom(16).hex()}")
        try:
            making.rename(gone)
        except FileNotFoundError:
            return
        lock = gone.with_name(gone.name.replace("making", "lock", 1))  # so that a sweep finds it if rm is killed
        lock.touch()
        from caisson.image.run import remove_in_background  # late: every command that names a VM imports this module

        remove_in_background(gone, lock)

    @contextmanager
    def scratch(self, step: str) -> Iterator[Path]:
        """Create an empty directory for a block; if the process is killed, the next one of its step removes it."""
        self._sweep(step)
        key = os.urandom(16).hex()
        with self._locked(step, key):
            making = self.root / step / f".making-{key}"
            try:
                making.mkdir()
                yield making
            finally:
                shutil.rmtree(making, ignore_errors=True)
                (making.parent / f".lock-{key}").unlink()

    def trim(self, cap: int, *, spare: float = 3600.0) -> list[Removed]:
        """Remove results, least recently used first, until all steps together have at most ``cap`` bytes, except those
        used within the last ``spare`` seconds.  Also removes remains of killed builds.  Returns what it removed.
        """
        results = [path for path in self.root.glob("*/*/") if (path / ".used").is_file()]
        sizes = {path: _recorded_size(path) for path in results}
        total, now = sum(sizes.values()), time.time()
        removed: list[Removed] = []
        for path in sorted(results, key=_last_use):
            if total - sum(one.bytes for one in removed) <= cap or now - _last_use(path) < spare:
                break
            if self.remove(path.parent.name, path.name):
                removed.append(Removed(path.parent.name, sizes[path]))
        self._sweep("*")
        return removed

    def remove(self, step: str, key: str) -> bool:
        """Remove a result; False if another process is making or has removed it."""
        gone = self.root / step / f".making-{key}"
        with contextlib.suppress(BlockingIOError, FileNotFoundError), self._locked(step, key, wait=False):
            (self.root / step / key).rename(gone)  # first: a result is complete or absent
            shutil.rmtree(gone, ignore_errors=True)
            return True
        return False

    def _sweep(self, steps: str) -> None:
        """Remove the remains of killed builds, of one step or (``*``) of all."""
        for lock in self.root.glob(f"{steps}/.lock-*"):
            step, key = lock.parent.name, lock.name.removeprefix(".lock-")
            with contextlib.suppress(BlockingIOError), self._locked(step, key, wait=False):
                shutil.rmtree(lock.parent / f".making-{key}", ignore_errors=True)
                lock.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, step: str, key: str, *, wait: bool = True) -> Iterator[None]:
        place = self.root / step
        file = place / f".lock-{key}"
        while True:
            try:
                self.root.mkdir(mode=0o700, parents=True, exist_ok=True)  # disks and memory are private to the owner
                place.mkdir(exist_ok=True)
                lock = file.open("w")
            except OSError as error:
                raise ImageError(
                    f"the cache {self.root} is not usable: {error}; set CAISSON_CACHE to another directory"
                ) from error
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_still(lock, file):
                    yield
                    return


def _is_still(lock: IO[str], file: Path) -> bool:
    """Return whether an open file still has its name: trim() removes locks that nobody holds."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def size_of(directory: Path) -> int:
    """Add up the bytes of all files below a directory."""
    return sum(
        os.lstat(os.path.join(place, name)).st_size  # noqa: PTH118 - thousands of files
        for place, _, names in os.walk(directory)
        for name in names
    )


def _recorded_size(result: Path) -> int:
    try:
        return int((result / ".used").read_text())
    except (OSError, ValueError):
        return size_of(result)


def _last_use(result: Path) -> float:
    try:
        return (result / ".used").stat().st_mtime
    except FileNotFoundError:
        return 0.0


def clean(root: Path | None = None, *, everything: bool = False) -> list[Removed]:
    """Remove all results, and with ``everything`` all downloads; returns what it removed.

    Results being built meanwhile stay.
    """
    cache = Cache(root or default_root())
    removed = cache.trim(0, spare=0)
    downloads = cache.root / "apt"
    if everything and downloads.is_dir():
        for place in sorted(downloads.iterdir()):
            removed.append(Removed("downloads", size_of(place)))
        shutil.rmtree(downloads)
    return removed
