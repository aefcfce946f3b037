"""Results of build steps, kept by the digest of what went into them.

<root>/<step>/<key>/        a finished result: it appears by rename, so whatever is there is whole
<root>/<step>/.lock-<key>   held while one is being made; a second builder of the same waits and then finds it
<root>/<step>/.making-<key> being made; left only by a build that was killed, and removed by the next one
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from image.errors import ImageError


def default_root() -> Path:
    """``$CAISSON_CACHE``, else ``$XDG_CACHE_HOME/caisson``, else ``~/.cache/caisson``."""
    if chosen := os.environ.get("CAISSON_CACHE"):
        return Path(chosen).resolve()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "caisson"


def digest_of(*inputs: object) -> str:
    """A key for these inputs (JSON values): 24 hex digits."""
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest()[:24]


def digest_of_files(root: Path, files: list[Path]) -> str:
    """The digest of files' names below ``root``, modes and contents, in an order of its own."""
    state = hashlib.sha256()
    for file in sorted(files):
        mode = file.stat().st_mode & 0o111
        data = file.read_bytes()
        state.update(f"{file.relative_to(root)}\0{mode:o}\0{len(data)}\0".encode())
        state.update(data)
    return state.hexdigest()[:24]


class Cache:
    """Finished results below one directory."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def get(self, step: str, key: str) -> Path | None:
        """The result, if there is one."""
        result = self.root / step / key
        if not result.is_dir():
            return None
        with_time = result / ".used"
        with_time.touch()  # what trim() goes by
        return result

    def get_or_make(self, step: str, key: str, make: Callable[[Path], None]) -> Path:
        """The result of a step: found, or made by ``make`` in an empty directory.

        A failure or an interruption leaves nothing that could be taken for a result.
        """
        found = self.get(step, key)
        if found is not None:
            return found
        with self._locked(step, key):
            found = self.get(step, key)  # by whoever held the lock before
            if found is not None:
                return found
            making = self.root / step / f".making-{key}"
            try:
                shutil.rmtree(making, ignore_errors=True)
                making.mkdir()
                making.chmod(0o755)
                make(making)
                (making / ".used").touch()
                making.rename(self.root / step / key)
            except BaseException as error:
                shutil.rmtree(making, ignore_errors=True)
                if isinstance(error, OSError):
                    raise ImageError(f"{step}: {error}") from error
                raise
        return self.root / step / key

    def trim(self, step: str, keep: int) -> None:
        """Forget all but the results of a step that were used last, and what killed builds have left."""
        place = self.root / step
        results = [path for path in place.iterdir() if not path.name.startswith(".")]
        for old in sorted(results, key=_last_use, reverse=True)[keep:]:
            shutil.rmtree(old, ignore_errors=True)
        for lock in place.glob(".lock-*"):
            key = lock.name.removeprefix(".lock-")
            with contextlib.suppress(BlockingIOError), self._locked(step, key, wait=False):
                shutil.rmtree(place / f".making-{key}", ignore_errors=True)
                lock.unlink(missing_ok=True)

    @contextmanager
    def _locked(self, step: str, key: str, *, wait: bool = True) -> Iterator[None]:
        place = self.root / step
        file = place / f".lock-{key}"
        while True:
            try:
                place.mkdir(parents=True, exist_ok=True)
                lock = file.open("w")
            except OSError as error:
                raise ImageError(
                    f"the cache {self.root} is not usable: {error}; CAISSON_CACHE names another"
                ) from error
            with lock:
                fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
                if _is_still(lock, file):
                    yield
                    return


def _is_still(lock: IO[str], file: Path) -> bool:
    """Whether an open file is what its name leads to: trim() removes locks that nobody holds."""
    try:
        return os.path.samestat(os.fstat(lock.fileno()), file.stat())
    except FileNotFoundError:
        return False


def _last_use(result: Path) -> float:
    try:
        return (result / ".used").stat().st_mtime
    except FileNotFoundError:
        return 0.0
