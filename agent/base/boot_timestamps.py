"""Timestamps of the agent's own boot stages, for a timeline of a boot.

A stage costs one reading of the clock and is always recorded; single imports are timed only with the option
`timeline`.  Times are microseconds of CLOCK_MONOTONIC.
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
    """Return the current time in microseconds of CLOCK_MONOTONIC."""
    return time.monotonic_ns() // 1000


class BootTimestamps:
    """Record ``stages`` with the time each was reached, and ``imports`` with the start and end of each."""

    def __init__(self) -> None:
        self.stages: list[tuple[str, int]] = []
        self.imports: list[tuple[str, int, int]] = []

    def __call__(self, stage: str) -> None:
        self.stages.append((stage, now()))

    def time_imports(self) -> None:
        """Time every import from now on."""
        sys.meta_path.insert(0, _Finder(self.imports))


class _Finder:
    """Find modules by all other finders, and time loading them.  Source: importlib.abc.MetaPathFinder."""

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
    """Wrap a loader until the module is loaded; extension modules load when they are created."""

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
