"""When this program got where on its way to serving: for whoever asks where the time of a boot went.

Marks cost a reading of the clock each and are always made.  What single imports take is measured only where the option
`timeline` asks for it.  Times are microseconds of CLOCK_MONOTONIC.
"""

from __future__ import annotations

import sys
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any


def now() -> int:
    """The time."""
    return time.monotonic_ns() // 1000


class Marks:
    """``reached`` holds the places and when they were reached; ``imports`` modules, and when each began and ended."""

    def __init__(self) -> None:
        self.reached: list[tuple[str, int]] = []
        self.imports: list[tuple[str, int, int]] = []

    def __call__(self, place: str) -> None:
        self.reached.append((place, now()))

    def time_imports(self) -> None:
        """From now on, measure."""
        sys.meta_path.insert(0, _Finder(self.imports))


class _Finder:
    """Finds modules by all the other finders, and has loading them measured.  Source: importlib.abc."""

    def __init__(self, times: list[tuple[str, int, int]]) -> None:
        self._times = times

    def find_spec(self, name: str, path: Sequence[str] | None, target: ModuleType | None = None) -> ModuleSpec | None:
        for finder in sys.meta_path:
            spec = None if finder is self else finder.find_spec(name, path, target)
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self._times)  # type: ignore[assignment]
                return spec
        return None


class _Loader:
    """Takes the place of a loader until the module is there: a library is loaded when the module is created."""

    def __init__(self, loader: Any, times: list[tuple[str, int, int]]) -> None:
        self._loader = loader
        self._times = times
        self._began = 0

    def create_module(self, spec: ModuleSpec) -> Any:
        self._began = now()
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._times.append((module.__name__, self._began, now()))
